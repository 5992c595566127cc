"""Fused calls with a quantised result in real processes: the bits, who serves, and what the admission test refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import quant_ranks
from comm_core.types import QUANTS
from harness import Ranks, install
from quant_ranks import DTYPES, SHAPES

OP = "all_reduce_add_rms_norm_quant"
# Two calls of each form, dtype, shape and kind; float32 tensors have no float32 operands beside them.
CALLS_OF_A_SHAPE = 2 * len(QUANTS) * (4 * len(DTYPES) - 2)
CALLS = CALLS_OF_A_SHAPE * len(SHAPES)
# Where a plugin's answer to each form counts, rather than each shape.
FEW = SHAPES[1:2]


def plugin(folder: Path, fault: str = "") -> list[Path]:
    return [install(folder, "quantizes", f"from quant_ranks import Quantizes\nplugin = Quantizes({fault!r})\n")]


def test_composed_calls_have_the_bits_of_the_norm_and_then_the_quantisation(ranks: Ranks) -> None:
    results = ranks.run(quant_ranks.every_form, world_size=3, deadline_s=250)
    for found in results:
        assert found["wrong"] == []
        assert found["count"] == CALLS
        assert found["counts"] == {(OP, "torch_distributed"): CALLS}
        assert found["digest"] == results[0]["digest"]


def test_calls_that_are_compared_between_the_ranks(ranks: Ranks) -> None:
    for found in ranks.run(quant_ranks.every_form, SHAPES[1:], env={"COMM_CORE_DEBUG": "1"}, deadline_s=280):
        assert found["wrong"] == []
        assert found["count"] == CALLS - CALLS_OF_A_SHAPE


def test_a_hook_serves_what_it_takes(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(quant_ranks.every_form, world_size=3, path=[plugin(tmp_path)] * 3, deadline_s=250)
    for found in results:
        assert found["wrong"] == []
        # One of four kinds, or of two for float32, has one dtype and a residual.
        plain = CALLS * 3 // 10
        assert found["counts"] == {(OP, "quantizes"): plain, (OP, "torch_distributed"): CALLS - plain}
        (line,) = [line for line in found["explained"].splitlines() if line.startswith(OP) and "quantizes up" in line]
        assert line.split()[1:6] == ["eager", "cpu", "float32,float16,bfloat16", "quantizes", "up"]
        assert found["digest"] == results[0]["digest"]


@pytest.mark.parametrize("form", QUANTS)
def test_a_form_that_a_hook_declines_is_composed(ranks: Ranks, tmp_path: Path, form: str) -> None:
    path = [plugin(tmp_path, f"declines {form}")] * 2
    for found in ranks.run(quant_ranks.every_form, FEW, path=path, deadline_s=250):
        assert found["wrong"] == []
        assert found["counts"][OP, "quantizes"] == CALLS_OF_A_SHAPE * 3 // 10 * 2 // 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("value", "fp8_static: 1 values aren't those of the norm"),
        ("scale", "fp8_per_group: 1 scales aren't those of the norm, the first at element "),
        ("sum", "1 wrong sums"),
        ("declines all", "it returned NotImplemented in every form"),
        ("declines without the norm", "fp8_static: it returned NotImplemented in one of two calls"),
    ],
)
def test_a_hook_with_other_bits_is_not_admitted(ranks: Ranks, tmp_path: Path, fault: str, reason: str) -> None:
    # What a hook declines, it must decline on every rank.
    path = [plugin(tmp_path, fault), plugin(tmp_path / "other", fault if fault.startswith("declines") else "")]
    for found in ranks.run(quant_ranks.every_form, FEW, path=path, deadline_s=250):
        assert found["wrong"] == []
        assert found["counts"] == {(OP, "torch_distributed"): CALLS_OF_A_SHAPE}
        assert f"the admission test of {OP} failed" in found["candidates"]["quantizes"]
        assert reason in found["candidates"]["quantizes"]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_calls_have_the_same_bits(ranks: Ranks, compiler: str) -> None:
    assert ranks.run(quant_ranks.compiled, compiler, deadline_s=280) == [[], []]


def test_torchs_own_checks(ranks: Ranks) -> None:
    for found in ranks.run(quant_ranks.check_operators, deadline_s=200):
        assert len(found) == 7
        for checks in found:
            assert checks == dict.fromkeys(checks, "SUCCESS")
