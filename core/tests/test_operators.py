"""The operators of `torch.ops.comm_core`, and handles in compiled code: real ranks, CPU tensors."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import op_ranks
import pytest

if TYPE_CHECKING:
    from harness import Ranks

INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler; this machine has none"
    ),
)
# "aot_eager" begins as "eager" does.
COMPILERS = ["aot_eager", INDUCTOR]
FORMS = {None: 17, "aot_eager": 17, "inductor": len(op_ranks.REUSING)}


@pytest.mark.parametrize("compiler", [None, *COMPILERS])
def test_every_form_is_right_in_one_graph(ranks: Ranks, compiler: str | None) -> None:
    # Of the sizes, the second makes them dynamic and the last shows that they are.
    for found in ranks.run(op_ranks.every_form, compiler, [4, 5, 7]):
        assert found == dict.fromkeys(found, [True] * 3)
        assert len(found) == FORMS[compiler]


@pytest.mark.parametrize("debug", ["0", "1"])
def test_calls_without_options_are_traced_on_every_kind_of_handle(ranks: Ranks, debug: str) -> None:
    kind = "ComparingBackend" if debug == "1" else "Backend"
    for found in ranks.run(op_ranks.defaults, env={"COMM_CORE_DEBUG": debug}):
        assert found == {"handle": kind, "sum": True, "norm": True, "quantised": True}


def test_a_name_means_its_group(ranks: Ranks) -> None:
    all_of_them = {"": 111.0, "world": 111.0}
    first, second = {"0": 11.0, "handle 0": 11.0}, {"1": 110.0, "handle 1": 110.0}
    right = [first | all_of_them, first | second | all_of_them, second | all_of_them]
    found = ranks.run(op_ranks.groups_by_name, "aot_eager", world_size=3)
    assert found == [{"eager": sums, "compiled": sums} for sums in right]


def test_without_a_handle(ranks: Ranks) -> None:
    for found in ranks.run(op_ranks.without_a_handle):
        assert len(found) == 16
        for kind, text in found.values():
            assert kind == "CommError"
            assert "has no handle in this process, or its handle was closed" in text
            assert "Call comm.get_backend(group) on all its ranks first" in text
        assert "the world has no handle" in found["functional"][1]
        assert 'group "nobody\'s" has no handle' in found["nobody's"][1]


def test_torchs_own_checks(ranks: Ranks) -> None:
    for found in ranks.run(op_ranks.check_operators):
        assert len(found) == 11
        for checks in found:
            assert checks == dict.fromkeys(checks, "SUCCESS")
            assert {"test_schema", "test_faketensor", "test_aot_dispatch_dynamic"} <= checks.keys()


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_nothing_is_differentiated(ranks: Ranks, compiler: str | None) -> None:
    for found in ranks.run(op_ranks.gradients, compiler):
        assert found == {"differentiated": [False] * 6, "beside": [2.0]}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_more_of_compiled_code(ranks: Ranks, compiler: str) -> None:
    for found in ranks.run(op_ranks.more_of_compiled_code, compiler):
        assert found == dict.fromkeys(found, True)
        assert len(found) == 5
