"""The store of every kind of process group, found and used by real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from comm_core._control.stage import Stage, StageAbortedError, StageTimeoutError
from comm_core._control.store import Control, store_of
from harness import DEAD, Ranks
from torch.distributed import distributed_c10d

Meet = tuple[str, Mapping[str, str]]


@pytest.fixture
def file_store(tmp_path: Path) -> Meet:
    """How the processes meet: `init_process_group`'s method, here a file, and the environment that goes with it."""
    return f"file://{tmp_path / 'store'}", {}


@pytest.fixture
def tcp_store() -> Iterator[Meet]:
    """Likewise in a store that the ranks' parent serves, as `torchrun` does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    yield f"tcp://127.0.0.1:{store.port}", env  # noqa: PT022 - this frame keeps the store


def meet_by(method: str) -> None:
    """Initialise the default process group once more, by this method."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", method, rank=rank, world_size=world_size)


def join(group: Any, timeout_s: float = 60.0) -> Control:
    control = Control(store_of(group), dist.get_rank(group), tuple(dist.get_process_group_ranks(group)), timeout_s)
    control.join(set())
    return control


def check(group: Any) -> None:
    mine = [dist.get_rank(), os.getpid()]
    control = join(group)
    with Stage(control, "step") as stage:
        assert stage.all_gather(mine)[control.rank] == mine
        assert [who for who, _ in stage.all_gather(mine)] == list(control.global_ranks)
    control.finish()


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


def check_groups(method: str) -> int:
    """Use the stores of the world and of groups of every kind; return how many there were beside the world."""
    meet_by(method)
    check(dist.group.WORLD)
    # Made by all ranks, of few, in another order than the job's too.
    groups: list[Any] = [dist.new_group([0, 2]), dist.new_group([3, 1]), dist.new_group([0, 1, 2, 3])]
    mine = [group for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER]
    # Made by their members alone.
    for ranks in ([0, 1], [2, 3]), ([0, 2], [1, 3]):
        mine += [dist.new_group(some, use_local_synchronization=True) for some in ranks if dist.get_rank() in some]
    for group in mine:
        check(group)
    dist.barrier()
    return len(mine)


@pytest.mark.parametrize("meet", ["file_store", "tcp_store"])
def test_every_kind_of_group_has_a_store_of_its_own(request: pytest.FixtureRequest, ranks: Ranks, meet: str) -> None:
    method, env = request.getfixturevalue(meet)
    assert ranks.run(check_groups, method, world_size=4, env=env) == [4] * 4


def lose_a_rank(method: str) -> str:
    meet_by(method)
    control = join(dist.group.WORLD, timeout_s=2.0)
    with Stage(control, "first", timeout_s=60.0) as stage:
        stage.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(StageTimeoutError) as caught, Stage(control, "second") as stage:
        stage.barrier()
    return str(caught.value)


def test_a_rank_that_is_killed_is_named(ranks: Ranks, tcp_store: Meet) -> None:
    method, env = tcp_store
    first, killed, third = ranks.run(lose_a_rank, method, world_size=3, env=env, dying=[1])
    assert killed == DEAD
    assert first.startswith("second: rank 1 didn't come in time, says rank ")
    assert third == first


def raise_on_a_rank(method: str) -> str:
    meet_by(method)
    control = join(dist.group.WORLD, timeout_s=3600.0)
    said = ""
    try:
        with Stage(control, "step") as stage:
            stage.barrier()
            if dist.get_rank() == 1:
                raise ValueError("boo")
            stage.barrier()
    except (StageAbortedError, ValueError) as error:
        said = str(error)
    control.finish()
    return said


def test_a_rank_that_raises_releases_other_processes(ranks: Ranks, file_store: Meet) -> None:
    method, env = file_store
    said = "step: rank 1 failed: ValueError: boo"
    assert ranks.run(raise_on_a_rank, method, world_size=3, env=env) == [said, "boo", said]
