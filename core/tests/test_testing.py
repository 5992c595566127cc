"""The conformance kit: it passes a backend without faults, and finds each fault by the test that is meant for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from broken_backends import BROKEN, Broken, source_of
from comm_core._testing.kit import Kit
from comm_core.testing import BackendConformance
from harness import install

STANDARD = tuple(name for name in vars(BackendConformance) if name.startswith("test_"))


def failing(folder: Path, broken: Broken) -> dict[str, str]:
    """The standard tests that fail for a backend, with the reason."""

    class Tests(BackendConformance):
        backend = "broken"
        repeatable = equal_bits = True

    kit = Kit("broken", folder, [install(folder / "plugin", "broken", source_of(broken))])
    failed = {}
    try:
        for name in STANDARD:
            try:
                getattr(Tests(), name)(kit)
            except pytest.skip.Exception:  # noqa: PERF203 - every test has its outcome
                continue
            except AssertionError as error:
                failed[name.removeprefix("test_")] = str(error)
    finally:
        kit.close()
    return failed


def test_a_backend_without_a_fault_passes(tmp_path: Path) -> None:
    assert failing(tmp_path, Broken(frozenset())) == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_found_by_the_test_that_is_meant_for_it(tmp_path: Path, name: str) -> None:
    found = failing(tmp_path, BROKEN[name])
    assert found.keys() == BROKEN[name].tests, found


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
