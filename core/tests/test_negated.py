"""Negated views, whose memory holds the negative of each element: hooks neither read nor write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comm_core.types import QUANTS
from fake_handle import aligned, one_backend

ROWS, HIDDEN = 4, 128


def negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(-tensor)


def operands() -> dict[str, torch.Tensor]:
    """Every tensor that a call may get; equal on each call."""
    return {
        "x": aligned(ROWS * HIDDEN).view(ROWS, HIDDEN),
        "residual": aligned(ROWS * HIDDEN).view(ROWS, HIDDEN) + 3,
        "weight": aligned(HIDDEN),
        "scale": torch.tensor([0.5]),
        "scales": torch.zeros(ROWS, 1),
        "out": torch.zeros(ROWS, HIDDEN),
        "residual_out": torch.zeros(ROWS, HIDDEN),
    }


CALLS: dict[str, tuple[Callable[[Any, dict[str, torch.Tensor]], Any], str]] = {
    "sum": (lambda backend, t: backend.all_reduce(t["x"]), "x"),
    "sum in place": (lambda backend, t: backend.all_reduce(t["x"], out=t["x"]), "x"),
    "sum into": (lambda backend, t: backend.all_reduce(t["x"], out=t["out"]), "x out"),
    "fused": (
        lambda backend, t: backend.all_reduce_add_rms_norm(t["x"], t["residual"], t["weight"]),
        "x residual weight",
    ),
    "fused in place": (
        lambda backend, t: backend.all_reduce_add_rms_norm(
            t["x"], t["residual"], t["weight"], out=t["x"], residual_out=t["residual"]
        ),
        "x residual",
    ),
    "fused into": (
        lambda backend, t: backend.all_reduce_add_rms_norm(
            t["x"], t["residual"], t["weight"], out=t["out"], residual_out=t["residual_out"]
        ),
        "weight out residual_out",
    ),
    "static": (
        lambda backend, t: backend.all_reduce_add_rms_norm_quant(
            t["x"], t["residual"], t["weight"], quant=QUANTS[0], scale=t["scale"], norm_out=t["out"]
        ),
        "x scale out",
    ),
    "a scale for each row": (
        lambda backend, t: backend.all_reduce_add_rms_norm_quant(
            t["x"], t["residual"], t["weight"], quant=QUANTS[1], scale=t["scales"], residual_out=t["residual_out"]
        ),
        "residual weight scales residual_out",
    ),
}
CASES = [(call, name) for call, (_, names) in CALLS.items() for name in names.split()]


@pytest.mark.parametrize(("call", "name"), CASES)
def test_negated_views_give_the_results_of_other_tensors(call: str, name: str) -> None:
    function, _ = CALLS[call]
    expected = torch.utils._pytree.tree_leaves(function(one_backend()[0], operands()))
    backend, fast, _ = one_backend()
    for _ in range(20):  # more than are checked before the hot path serves the others
        given = operands()
        given[name] = negated(given[name])
        for one, other in zip(torch.utils._pytree.tree_leaves(function(backend, given)), expected, strict=True):
            assert one is other is None or torch.equal(one.float(), other.float())
    assert len(fast.calls) == 20


def test_a_key_that_the_hot_path_serves_is_checked_again_after_a_negated_output() -> None:
    backend, fast, _ = one_backend()
    x = operands()["x"]
    for _ in range(20):
        backend.all_reduce(x)
    strided = torch.zeros(ROWS, HIDDEN, dtype=torch.complex64).conj().imag
    for _ in range(20):
        assert torch.equal(backend.all_reduce(x, out=strided), 2 * x)
        assert torch.equal(backend.all_reduce(negated(x)), 2 * x)
    assert len(fast.calls) == 60
