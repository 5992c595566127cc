"""The store of every kind of process group, found and used by real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

PATIENCE_S = 120

# What each rank runs before a test's own code.
PREAMBLE = """
import os

import torch.distributed as dist
from comm_core._control.stage import Stage, StageAbortedError, StageTimeoutError
from comm_core._control.store import Control, store_of

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join(group, timeout_s=60.0):
    ranks = tuple(dist.get_process_group_ranks(group))
    control = Control(store_of(group), dist.get_rank(group), ranks, timeout_s)
    control.join(set())
    return control


def check(group):
    control = join(group)
    with Stage(control, "step") as stage:
        assert stage.all_gather([rank, os.getpid()])[control.rank] == [rank, os.getpid()]
        assert [who for who, _ in stage.all_gather([rank, os.getpid()])] == list(control.global_ranks)
    control.finish()


dist.init_process_group("gloo", os.environ["METHOD"], rank=rank, world_size=world_size)
"""


@pytest.fixture
def file_store(tmp_path: Path) -> Mapping[str, str]:
    """How the processes meet, by `init_process_group`'s method: in a file."""
    return {"METHOD": f"file://{tmp_path / 'store'}"}


@pytest.fixture
def tcp_store() -> Iterator[Mapping[str, str]]:
    """Likewise in a store that the ranks' parent serves, as `torchrun` does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {  # noqa: PT022 - this frame keeps the store
        "METHOD": f"tcp://127.0.0.1:{store.port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def run(world_size: int, meet: Mapping[str, str], code: str, *, dying: tuple[int, ...] = ()) -> list[str]:
    """Run `code` in every rank; the last line that each printed. One that isn't `dying` must end well."""
    body = PREAMBLE + textwrap.dedent(code)
    environ = {**os.environ, **meet, "WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", body],
            env={**environ, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        ends = [process.communicate(timeout=PATIENCE_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (_, errors) in enumerate(ends):
        assert rank in dying or ranks[rank].returncode == 0, f"rank {rank}:\n{errors[-3000:]}"
    return [output.splitlines()[-1] if output else "" for output, _ in ends]


def test_torch_still_has_the_way_to_a_groups_store_and_it_can_be_cloned(tmp_path: Path) -> None:
    assert callable(distributed_c10d._get_process_group_store)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        store = distributed_c10d._get_process_group_store(dist.group.WORLD)
        assert isinstance(store, dist.Store)
        clone = store.clone()
        assert clone is not store
        clone.set("key", "value")
        assert store.get("key") == b"value"
        assert clone.compare_set("key", "value", "other") == b"other"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("meet", ["file_store", "tcp_store"])
def test_every_kind_of_group_has_a_store_of_its_own(request: pytest.FixtureRequest, meet: str) -> None:
    code = """
        check(dist.group.WORLD)
        # Made by all ranks, of few, in another order than the job's too.
        groups = [dist.new_group([0, 2]), dist.new_group([3, 1]), dist.new_group([0, 1, 2, 3])]
        mine = [group for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER]
        # Made by their members alone.
        for ranks in ([0, 1], [2, 3]), ([0, 2], [1, 3]):
            mine += [dist.new_group(some, use_local_synchronization=True) for some in ranks if rank in some]
        for group in mine:
            check(group)
        dist.barrier()
        dist.destroy_process_group()
        print(len(mine))
    """
    assert run(4, request.getfixturevalue(meet), code) == ["4"] * 4


def test_a_rank_that_is_killed_is_named(tcp_store: Mapping[str, str]) -> None:
    code = """
        control = join(dist.group.WORLD, timeout_s=2.0)
        with Stage(control, "first", timeout_s=60.0) as stage:
            stage.barrier()
        if rank == 1:
            os.kill(os.getpid(), 9)
        try:
            with Stage(control, "second") as stage:
                stage.barrier()
        except StageTimeoutError as error:
            print(error, flush=True)
        os._exit(0)
    """
    first, killed, third = run(3, tcp_store, code, dying=(1,))
    assert first.startswith("second: rank 1 didn't come in time, says rank ")
    assert third == first
    assert "second" not in killed


def test_a_rank_that_raises_releases_other_processes(file_store: Mapping[str, str]) -> None:
    code = """
        control = join(dist.group.WORLD, timeout_s=3600.0)
        try:
            with Stage(control, "step") as stage:
                stage.barrier()
                if rank == 1:
                    raise ValueError("boo")
                stage.barrier()
        except (StageAbortedError, ValueError) as error:
            print(error)
        control.finish()
    """
    said = "step: rank 1 failed: ValueError: boo"
    assert run(3, file_store, code) == [said, "boo", said]
