"""SGLang's own groups on CPUs, release by release, of the parts that sglang_parts.py wrote, and the five reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_parts
import sglang_ranks
from harness import Ranks, install
from test_sglang_groups import ABSENT, LOCAL, RECORDING

RELEASES = sglang_parts.releases() or [
    pytest.param("", marks=pytest.mark.skip(reason="no parts of SGLang: see integrations/sglang/tests/sglang_parts.py"))
]
Run = Callable[..., list[Any]]


@pytest.fixture(params=RELEASES, scope="module")
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(release: str, tmp_path: Path) -> Iterator[Run]:
    """A function that runs another once on every rank: SGLang's operators can be defined once in a process."""
    pools: list[Ranks] = []
    metadata = sglang_ranks.write_metadata(tmp_path / "metadata", release)
    folders = [metadata, sglang_parts.FOLDER / release, install(tmp_path / "recording", "recording", RECORDING)]

    def call(function: Callable[..., Any], *arguments: Any, found: dict[str, str] | None = None, **options: Any) -> Any:
        world_size = options.get("world_size", 2)
        more = [install(tmp_path / name, name, source) for name, source in (found or {}).items()]
        (folder := tmp_path / f"pool{len(pools)}").mkdir()
        pools.append(pool := Ranks(folder))
        return pool.run(function, *arguments, path=[[*folders, *more]] * world_size, **options)

    yield call
    for pool in pools:
        pool.close()


def test_real_groups_on_cpus(run: Run) -> None:
    for one in run(sglang_ranks.serve):
        assert (one["class"], one["backend"], one["events"], one["closed"]) == (
            "CommAllReduce",
            "recording",
            None,
            True,
        )


def test_real_groups_without_a_handle(run: Run) -> None:
    for one in run(sglang_ranks.serve, "pp", False):
        assert (one["class"], one["backend"]) == ("NoneType", None)


def test_an_unavailable_backend_is_passed_over_in_captures_too(run: Run) -> None:
    for one in run(sglang_ranks.unavailable, found={"absent": ABSENT}):
        assert one == {"backend": "recording", "reason": True, "is_v2": True, "pushes": False}


def test_a_group_across_two_hosts_loses_only_what_needs_one_host(run: Run) -> None:
    across = run(sglang_ranks.on_two_hosts, [[0, 2], [1, 3]], found={"local": LOCAL}, world_size=4)
    assert across == [("recording", [])] * 4


def test_a_group_missing_in_sglangs_list_is_captured(run: Run) -> None:
    for one in run(sglang_ranks.capture_unlisted):
        assert one == {"entered": 2, "left": 2, "sums": ["sum"]}


def test_fused_norms_sum_over_a_group_whose_first_rank_isnt_0(run: Run) -> None:
    for rank, one in enumerate(run(sglang_ranks.fuse, [[0, 1], [2, 3]], world_size=4)):
        assert one == {"first": rank // 2 * 2, "prepared": [(2048, 64, "torch.float32")], "workspaces": []}
