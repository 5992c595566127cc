"""The kernels on two GPUs: every algorithm exact, in graphs too, bounded when a peer is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernel_ranks
import pytest
from comm_plugin_customar_v2 import policy
from harness import DEAD, Ranks, install
from kernel_ranks import SIZES

pytestmark = pytest.mark.gpus(2)
NAME, GPUS = "customar_v2", "cpu:gloo,cuda:nccl"
SHAPES = (
    *("oneshot_push", "oneshot_push:vecs=4,threads=256,blocks=132", "oneshot_push:threads=32"),
    *("oneshot_stream:vecs=4,pipeline_depth=1", "oneshot_stream:vecs=2,threads=512,blocks=132,pipeline_depth=3"),
    *("twoshot_push", "twoshot_push:vecs=4,pipeline_depth=1", "twoshot_push:vecs=2,threads=128,pipeline_depth=9999"),
)
SETTINGS = tuple({policy.OPTION: shape} for shape in ("", *SHAPES))
REPLAYED = (2, 1024, 8190, 256 << 10, (6 << 20) + 14)  # bytes


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """Folders in which the plugin, alone, is found by each of two ranks."""
    return [[install(tmp_path, NAME, "import comm_plugin_customar_v2 as plugin\n")]] * 2


def test_sums_and_replays_of_every_algorithm_have_the_bits_of_the_reference(
    ranks: Ranks, found: list[list[Path]]
) -> None:
    arguments = (SETTINGS, SIZES, REPLAYED, 100)
    results = ranks.run(kernel_ranks.every, NAME, *arguments, backend=GPUS, path=found, deadline_s=280)
    kernel_ranks.check_every(results, *arguments)


@pytest.mark.gpus(4)
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks(ranks: Ranks, found: list[list[Path]], world_size: int) -> None:
    job: dict[str, Any] = {"world_size": world_size, "backend": GPUS, "path": found[:1] * world_size, "deadline_s": 280}
    settings = [{policy.OPTION: shape} for shape in ("", *policy.ALGORITHMS)]
    sizes = tuple(size for size in SIZES if size <= 8 << 20)  # what the conservative table serves
    arguments = (settings, sizes, (2, 8190, 256 << 10, (6 << 20) + 14), 50)
    kernel_ranks.check_every(ranks.run(kernel_ranks.every, NAME, *arguments, **job), *arguments)
    for setting in settings:
        assert ranks.run(kernel_ranks.mixed, NAME, 2000, env=setting, **job) == [2000] * world_size


def test_mixed_calls(ranks: Ranks, found: list[list[Path]]) -> None:
    calls = kernel_ranks.soak_calls()
    deadline_s = max(200, calls // 2000)
    results = ranks.run(kernel_ranks.mixed, NAME, calls, backend=GPUS, path=found, deadline_s=deadline_s)
    assert results == [calls] * 2


def test_a_killed_peer_is_named_after_a_call_a_replay_and_a_fused_call(ranks: Ranks, found: list[list[Path]]) -> None:
    # NCCL at the route's end would take the process with it.
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "2", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    texts, dead = ranks.run(kernel_ranks.killed, NAME, True, backend=GPUS, path=found, env=env, dying=[1])
    assert dead == DEAD
    assert len(texts) == 3
    assert all("rank 1 didn't come within 2 s" in text for text in texts), texts


def test_ranks_that_come_with_different_messages_time_out(ranks: Ranks, found: list[list[Path]]) -> None:
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    results = ranks.run(kernel_ranks.differing, NAME, backend=GPUS, path=found, env=env)
    kernel_ranks.check_differing(results)


def test_a_late_rank_is_named_by_the_waits_of_the_other(ranks: Ranks, found: list[list[Path]]) -> None:
    sizes = (1024, 256 << 10, 4 << 20)
    results = ranks.run(kernel_ranks.late, NAME, sizes, True, backend=GPUS, path=found, deadline_s=200)
    kernel_ranks.check_late(results, 4 * (len(sizes) + 1))
