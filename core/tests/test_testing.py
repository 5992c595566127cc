"""The conformance kit: it passes a backend without faults, and finds each fault by the test that is meant for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from broken_backends import BROKEN, Broken, source_of
from comm_core._testing.kit import Kit
from comm_core.testing import BackendConformance
from harness import Ranks, install

STANDARD = tuple(name for name in vars(BackendConformance) if name.startswith("test_"))


# It costs the pool its processes each time; the faults of most backends have nothing to do with it.
KILLS = "test_a_killed_rank_ends_the_others_calls"


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
    found = failing(ranks, tmp_path, BROKEN[name], [test for test in STANDARD if test != KILLS])
    assert found.keys() == BROKEN[name].tests, sorted(found)


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
