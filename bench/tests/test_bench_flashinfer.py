"""FlashInfer's fused kernels as peers, with a fake of its module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from comm_bench.cases import OPS, BenchCase
from comm_bench.peer_flashinfer import _Fused
from comm_core import fallback

if TYPE_CHECKING:
    from comm_bench.contenders import Contender


def allreduce_fusion(tensor: torch.Tensor, workspace: str, pattern: int, **operands: Any) -> None:
    """Do on one rank what FlashInfer documents of the patterns 1, 2 and 10."""
    assert workspace == "the workspace"
    assert operands["rms_eps"] == 1e-6
    target = operands.get("norm_out", torch.empty_like(tensor))
    residual, summed, weight = (operands[name] for name in ("residual_in", "residual_out", "rms_gamma"))
    fallback.add_rms_norm(tensor, residual, weight, 1e-6, 0.0, target, summed)
    assert ("quant_out" in operands) is (pattern != 1)
    if pattern == 2:
        fallback.quantize(target, "fp8_static", operands["scale_factor"], operands["quant_out"])
    elif pattern == 10:
        fallback.quantize(target, "fp8_per_token", operands["scale_out"], operands["quant_out"])


@pytest.fixture
def contender() -> Contender:
    module = SimpleNamespace(allreduce_fusion=allreduce_fusion)
    workspace = SimpleNamespace(module=module, value="the workspace", capacity=1 << 20, world_size=2)
    return _Fused(cast("Any", workspace), one_shot=True)


def test_it_takes_the_forms_of_cores_format(contender: Contender) -> None:
    cases = [BenchCase(op, "graph", "out", "bfloat16", "cuda", (4, 256)) for op in OPS]
    assert [contender.supports(case) for case in cases] == [False, True, True, True, False]


@pytest.mark.parametrize("in_place", [False, True])
def test_its_results_are_those_of_a_norm_and_a_quantisation(contender: Contender, in_place: bool) -> None:
    tensor, residual = torch.randn(2, 4, 256).to(torch.bfloat16)
    weight = torch.ones(256, dtype=torch.bfloat16)
    normed, summed = fallback.add_rms_norm(tensor, residual, weight, 1e-6, 0.0, None, None)
    for quant, given in (("fp8_static", torch.tensor([0.015])), ("fp8_per_token", None)):
        scale = torch.empty(4, 1) if given is None else given
        values, scale = fallback.quantize(normed, quant, scale)
        kept = residual.clone()
        found = contender.call_quant((tensor, kept), weight, quant, given, in_place=in_place)
        assert (found[2] is kept) is in_place
        assert torch.equal(found[0].float(), values.float())
        assert torch.equal(found[1], scale)
        assert torch.equal(found[2], summed)
