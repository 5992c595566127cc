"""Registers the backend "comm" with torch.distributed, at the end of `import torch`, where comm-core is installed.

Apart from the package, because importing that takes longer than a program without the backend should pay for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["register"]


def register() -> None:
    """Register the backend. torch calls it by the entry-point group `torch.backends`; it never raises."""
    try:
        import torch.distributed as dist

        if dist.is_available() and "COMM" not in dist.Backend._plugins:  # noqa: SLF001 - torch has no public name
            dist.Backend.register_backend("comm", _create, extended_api=True, devices=["cpu", "cuda"])
    except Exception:
        # An exception would end `import torch`.
        import logging

        logging.getLogger("comm_core").exception("comm_core: can't register the backend comm of torch.distributed")


def _create(options: Any, backend_options: Any = None) -> Any:
    from comm_core._c10d.create import create_group

    return create_group(options, backend_options)
