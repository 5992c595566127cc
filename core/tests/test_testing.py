"""The conformance kit: it passes a backend without faults, and finds each fault by the test that is meant for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from broken_backends import BROKEN, FUSED_ALONE, SERVES, SOUND, Broken, source_of
from comm_core._testing.kit import Kit
from comm_core.testing import BackendConformance
from harness import Ranks, install

STANDARD = tuple(name for name in vars(BackendConformance) if name.startswith("test_"))


# The tests of what only some backends have, or promise.
OPTIONAL = ("serves_a_group", "captur", "fused", "suspen", "prepar", "same_bits", "leave", "variants", "padded", "wire")
# SOAK_KIT=1 runs every standard test on every backend with a fault, and the slow ones.
SOAK = bool(os.environ.get("SOAK_KIT"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of its own, of processes that stay after a broken backend has made them raise.

    Where a fault makes one rank raise and leaves the other waiting, the first one's report is enough.
    """
    pool = Ranks(tmp_path_factory.mktemp("ranks"), lasting=True, grace_s=3.0)
    yield pool
    pool.close()


def failing(
    ranks: Ranks, folder: Path, broken: Broken, tests: Sequence[str], release_s: float, *, skips: bool = False
) -> dict[str, str]:
    """The standard tests, of those given, that fail for a backend, with the reason; with `skips` those skipped, too."""

    class Tests(BackendConformance):
        backend = "broken"
        world_sizes = (2,)
        huge_on_cpus = SOAK
        repeatable = equal_bits = True

    kit = Kit("broken", ranks, pytest.skip, [install(folder / "plugin", "broken", source_of(broken))], release_s)
    failed = {}
    for name in tests:
        try:
            getattr(Tests(), name)(kit)
        except pytest.skip.Exception as error:  # noqa: PERF203 - every test has its outcome
            if skips:
                failed[name.removeprefix("test_")] = str(error)
        except AssertionError as error:
            failed[name.removeprefix("test_")] = str(error)
    return failed


def test_a_backend_without_a_fault_passes(ranks: Ranks, tmp_path: Path) -> None:
    # The other tests run on the plugin of docs/writing-a-plugin.md, which has no faults either.
    tests = STANDARD if SOAK else [test for test in STANDARD if any(word in test for word in OPTIONAL)]
    assert failing(ranks, tmp_path, SOUND, tests, 20.0) == {}


def test_a_backend_that_serves_only_the_fused_operation_is_tested_by_that(ranks: Ranks, tmp_path: Path) -> None:
    # Half a minute each, or they end processes.
    slow = "killed", "without_one_rank", "raises_on_one_rank", "slow", "fault_in_connect"
    tests = [name for name in STANDARD if not any(word in name for word in slow)]
    outcomes = failing(ranks, tmp_path, FUSED_ALONE, tests, 20.0, skips=True)
    claims = {reason.partition("claim this: ")[2] for reason in outcomes.values()}
    hooks = {"the hooks suspend and resume", "the hooks variants and use_variants", "the hook padded_session"}
    assert claims == {"another operation than all_reduce_add_rms_norm", *hooks}, outcomes
    passed = {"captured_calls_are_replayed", "fused_calls_are_right", "closed_groups_leave_nothing"}
    assert not passed & outcomes.keys()


@pytest.mark.parametrize("name", [name for name, broken in BROKEN.items() if SOAK or not broken.slow])
def test_a_fault_is_found_by_the_tests_that_are_meant_for_it(ranks: Ranks, tmp_path: Path, name: str) -> None:
    meant = BROKEN[name].tests | (BROKEN[name].also if SOAK else frozenset())
    # Those that kill a rank end the pool's processes.
    tests = (
        [test for test in STANDARD if "killed" not in test] if SOAK else [f"test_{name}" for name in {SERVES, *meant}]
    )
    found = failing(ranks, tmp_path, BROKEN[name], tests, 2.0)
    assert found.keys() == meant, found


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
