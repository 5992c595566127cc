"""The plain process group under one of the backend "comm": the group of torch's own backends that core works with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["plain_group"]


def plain_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the plain group under `group`; any group of another backend itself."""
    plain: dist.ProcessGroup = getattr(group, "plain", group)
    return plain
