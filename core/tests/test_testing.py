"""The conformance kit: it passes a backend without faults, and finds each fault by the test that is meant for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from broken_backends import BROKEN, Broken, source_of
from comm_core._testing.kit import Kit
from comm_core.testing import BackendConformance
from harness import Ranks, install

STANDARD = tuple(name for name in vars(BackendConformance) if name.startswith("test_"))


# The other tests of a backend with a fault: those that take less than a second. With SOAK_KIT=1 all but the one that
# kills a rank, and with it the pool's processes.
CHEAP = (
    "test_it_serves_a_group_or_says_why_not",
    "test_inputs_are_kept_and_only_outputs_written",
    "test_tensors_of_any_layout_are_summed",
    "test_two_groups_dont_mix",
    "test_preparing_again_and_for_larger_shapes_works",
)


def failing(ranks: Ranks, folder: Path, broken: Broken, tests: Sequence[str]) -> dict[str, str]:
    """The standard tests, of those given, that fail for a backend, with the reason."""

    class Tests(BackendConformance):
        backend = "broken"
        world_sizes = (2,)
        repeatable = equal_bits = True

    kit = Kit("broken", ranks, [install(folder / "plugin", "broken", source_of(broken))])
    failed = {}
    for name in tests:
        try:
            getattr(Tests(), name)(kit)
        except pytest.skip.Exception:  # noqa: PERF203 - every test has its outcome
            continue
        except AssertionError as error:
            failed[name.removeprefix("test_")] = str(error)
    return failed


def test_a_backend_without_a_fault_passes(ranks: Ranks, tmp_path: Path) -> None:
    assert failing(ranks, tmp_path, Broken(frozenset()), STANDARD) == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_found_by_the_test_that_is_meant_for_it(ranks: Ranks, tmp_path: Path, name: str) -> None:
    meant = BROKEN[name].tests
    others = STANDARD if os.environ.get("SOAK_KIT") else CHEAP
    tests = [test for test in STANDARD if test in others or test.removeprefix("test_") in meant]
    tests = [test for test in tests if test != "test_a_killed_rank_ends_the_others_calls"]
    found = failing(ranks, tmp_path, BROKEN[name], tests)
    assert found.keys() == meant, sorted(found)


def test_a_standard_test_cant_be_replaced_or_left_out() -> None:
    def other(self: Any, kit: Any) -> None: ...

    for replacement in (None, other):
        with pytest.raises(TypeError, match=r"test_two_groups_dont_mix replaces a standard test.*xfail"):
            type("Tests", (BackendConformance,), {"backend": "mine", "test_two_groups_dont_mix": replacement})


def test_a_rule_that_a_backend_cant_keep_is_marked() -> None:
    @pytest.mark.xfail(reason="one group a process, for now")
    def expected_to_fail(self: Any, kit: Any) -> None: ...

    type("Tests", (BackendConformance,), {"backend": "mine", "test_two_groups_dont_mix": expected_to_fail})


def test_a_backend_is_named() -> None:
    with pytest.raises(TypeError, match="names no backend"):
        type("Tests", (BackendConformance,), {})
