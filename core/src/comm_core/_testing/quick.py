"""The quick half of the conformance kit, for `comm-core check --ranks N`: without pytest and without time-outs."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from comm_core._testing import capture_cases, cases, fault_cases
from comm_core._testing.kit import Kit
from comm_core._testing.ranks import Ranks

__all__ = ["run_quick_tests"]

_TESTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "sums are as near as rounding allows": (cases.sums_are_near_the_reference, ()),
    "integers are summed exactly": (cases.integers_are_exact, ()),
    "inputs are kept and only outputs written": (cases.outputs_go_where_they_should, ()),
    "tensors of any layout are summed": (cases.any_layout_is_summed, ()),
    "many calls in a row are right": (cases.many_calls, (200,)),
    "two groups don't mix": (cases.groups_dont_mix, ()),
}
"""The tests of plain sums by name: a function that each rank runs, and its arguments."""
_TESTS_OF_ANY_OPERATION: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "preparing again and for larger shapes works": (cases.preparing_is_repeatable, ()),
    "captured calls are replayed": (capture_cases.captured_calls_are_replayed, ()),
    "closed groups leave nothing": (cases.closed_groups_leave_nothing, (6,)),
    "a rank that is slow in connect is waited for": (fault_cases.connect_is_slow, (0.3,)),
}
"""Those that backends pass, too, which serve the fused operation alone."""


class _SkippedError(Exception):
    """The test doesn't apply to the backend."""


def _skip(reason: str) -> NoReturn:
    raise _SkippedError(reason)


def run_quick_tests(name: str, world_size: int) -> Iterator[tuple[str, str, str]]:
    """Run the tests on ranks of this machine; yield each test's name, its outcome, and a text.

    The outcome is "passed", "failed" or "skipped".
    """
    with tempfile.TemporaryDirectory(prefix="comm-core-check-") as folder:
        ranks = Ranks(Path(folder))
        kit = Kit(name, ranks, _skip)
        try:
            yield "it serves the group or says why not", *_outcome(lambda: kit.check_outcome(world_size))
            for tests in (_TESTS, _TESTS_OF_ANY_OPERATION):
                for test, (case, arguments) in tests.items():
                    run = functools.partial(kit.run, case, *arguments, world_size=world_size)
                    yield test, *_outcome(functools.partial(run, any_operation=tests is not _TESTS))
        finally:
            ranks.close()


def _outcome(test: Callable[[], object]) -> tuple[str, str]:
    try:
        test()
    except _SkippedError as error:
        return "skipped", str(error)
    except AssertionError as error:
        return "failed", str(error)
    return "passed", ""
