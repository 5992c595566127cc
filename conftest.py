"""The fixture and the options that the tests of all packages share: real processes, and GPU tests.

The fixture `ranks` runs functions in real processes; see tests/harness.py.

A test marked `@pytest.mark.gpus(2)` needs two GPUs. By default such tests skip, and the report lists them. `pytest
--require-gpus 2` runs the tests that need up to two GPUs. That run ends at once if the machine has fewer GPUs or no GPU
test was selected, and it fails if one of these tests, or a whole file, skips. Tests that need more GPUs still skip, as
do the conformance kit's tests of what a backend doesn't claim.

`pytest --fast` runs only the tests that need no other process and no compiler, some two thirds of all.

`pytest --random-order` shuffles the tests across files and prints the seed, for `--random-order-seed`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from harness import Ranks

pytest_plugins = ["pytester"]
# In the reasons for which the conformance kit skips a test of what the backend doesn't claim.
UNCLAIMED = "doesn't claim this: "
# What starts processes or compiles, for `--fast`: modules and classes that a test's module imports, and fixtures.
SLOW_IMPORTS = {"BackendConformance", "Ranks", "emulation", "host_code", "multiprocessing", "subprocess", "wheelhouse"}
SLOW_FIXTURES = {"kit", "native", "pip", "pytester", "ranks"}


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A pool of processes that run functions as ranks; see harness.py."""
    from harness import Ranks

    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def pytest_configure(config: pytest.Config) -> None:
    # With pytest-random-order, which is off by default: the order is shuffled across files, not within each.
    if str(config.getoption("random_order_bucket", "")).startswith("default:"):
        config.option.random_order_bucket = "default:global"
    # For every connection to a store, torch looks up the host name of the address. 127.0.0.1 in IPv6 notation has none,
    # and if the name server drops the query, each connection waits for the resolver's 5 seconds. A process reads this
    # variable once, at its first query.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpus",
        type=int,
        default=0,
        metavar="N",
        help="run the tests that need up to N GPUs; an error if the machine has fewer",
    )
    parser.addoption("--fast", action="store_true", help="run only tests that start no process and compile nothing")


def pytest_sessionstart(session: pytest.Session) -> None:
    promised = session.config.getoption("require_gpus")
    if promised < 0:
        raise pytest.UsageError(f"--require-gpus {promised}: the number can't be negative")
    found = gpu_count() if promised else 0
    if found < promised:
        raise pytest.UsageError(f"--require-gpus {promised}: torch can use only {found} on this machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    promised = config.getoption("require_gpus")
    if config.getoption("fast"):
        config.hook.pytest_deselected(items=[item for item in items if starts_processes(item)])
        items[:] = [item for item in items if not starts_processes(item)]
    for item in items:
        needed = gpus_needed(item)
        if needed > promised:
            reason = f"needs {needed} GPU(s), the run promises {promised}: pytest --require-gpus {needed}"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    promised = session.config.getoption("require_gpus")
    if promised and not any(0 < gpus_needed(item) <= promised for item in session.items):
        raise pytest.UsageError(f"--require-gpus {promised}: no test that was selected uses a GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected_to_fail = hasattr(report, "wasxfail")
    promised = 0 < gpus_needed(item) <= item.config.getoption("require_gpus")
    if report.skipped and promised and not expected_to_fail and UNCLAIMED not in skip_reason(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped in a run that promises its GPUs: {skip_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and collector.config.getoption("require_gpus"):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skipped in a run that promises GPUs: {skip_reason(report.longrepr)}"
    return report


def gpus_needed(item: pytest.Item) -> int:
    """Return the number of GPUs that a test needs; 0 without the marker."""
    marker = item.get_closest_marker("gpus")
    if marker is None:
        return 0
    match marker.args:
        case (int(count),) if count > 0 and not marker.kwargs:
            return count
    raise pytest.UsageError(f"{item.nodeid}: write the marker as gpus(2), with the number of GPUs that the test needs")


def starts_processes(item: pytest.Item) -> bool:
    """Return whether a test starts processes or compiles, or may: what its module imports and its fixtures say that."""
    imported = vars(item.module) if isinstance(item, pytest.Function) else {}
    fixtures: set[str] = set(getattr(item, "fixturenames", ()))
    return not SLOW_IMPORTS.isdisjoint(imported) or not SLOW_FIXTURES.isdisjoint(fixtures)


def gpu_count() -> int:
    """Return the number of GPUs that torch sees, without creating a CUDA context."""
    import torch

    return torch.cuda.device_count()


def skip_reason(longrepr: object) -> str:
    """Return the reason of a skip from pytest's (path, line, reason)."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
