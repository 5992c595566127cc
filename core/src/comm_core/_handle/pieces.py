"""Calls of hooks that take a large message in pieces, for deterministic groups; see `_plan/pieces.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Pieces", "all_reduce", "all_reduce_add_rms_norm"]

#: A hook, its session, and the most bytes of one call; the first argument of the functions below.
Pieces = tuple[Callable[..., Any], Any, int]


def all_reduce(pieces: Pieces, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Implement the hook `all_reduce` by several calls of a backend's."""
    hook, session, nbytes = pieces
    result = torch.empty_like(tensor) if out is None else out
    source, target = tensor.view(-1), result.view(-1)
    step = nbytes // tensor.itemsize
    for start in range(0, source.numel(), step):
        part = source[start : start + step]
        hook(session, part, part if result is tensor else target[start : start + step])
    return result


def all_reduce_add_rms_norm(
    pieces: Pieces,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
) -> Any:
    """Implement the hook `all_reduce_add_rms_norm` by several calls of a backend's, each with some of the rows."""
    hook, session, nbytes = pieces
    normed = torch.empty_like(tensor) if out is None else out
    summed = torch.empty_like(residual) if residual_out is None else residual_out
    step = nbytes // (tensor.shape[1] * tensor.itemsize)
    for start in range(0, tensor.shape[0], step):
        rows = slice(start, start + step)
        x, r = tensor[rows], residual[rows]
        results = hook(
            session,
            x,
            r,
            weight,
            eps,
            weight_offset,
            x if normed is tensor else normed[rows],
            r if summed is residual else summed[rows],
        )
        if results is NotImplemented:
            if start:
                raise NotImplementedError("the backend declined some of a message's rows, after it took others")
            return NotImplemented
    return normed, summed
