"""The kernels on two GPUs: every algorithm exact, in graphs too, bounded when a peer is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import kernel_ranks
import pytest
import torch
from comm_plugin_customar_v2 import policy
from harness import DEAD, Ranks, install
from kernel_ranks import DTYPES, SIZES

pytestmark = pytest.mark.gpus(2)
NAME, GPUS = "customar_v2", "cpu:gloo,cuda:nccl"
SHAPES = (
    *("oneshot_push", "oneshot_push:vecs=4,threads=256,blocks=132", "oneshot_push:threads=32"),
    *("oneshot_stream:vecs=4,pipeline_depth=1", "oneshot_stream:vecs=2,threads=512,blocks=132,pipeline_depth=3"),
    *("twoshot_push", "twoshot_push:vecs=4,pipeline_depth=1", "twoshot_push:vecs=2,threads=128,pipeline_depth=9999"),
)


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """Folders in which the plugin, alone, is found by each of two ranks."""
    return [[install(tmp_path, NAME, "import comm_plugin_customar_v2 as plugin\n")]] * 2


@pytest.mark.parametrize("shape", ["", *SHAPES])
def test_sums_are_the_references_to_the_bit(ranks: Ranks, found: list[list[Path]], shape: str) -> None:
    env = {policy.OPTION: shape}
    results = ranks.run(kernel_ranks.sums, NAME, SIZES, backend=GPUS, path=found, env=env, deadline_s=280)
    assert results == [2 * len(DTYPES) * len(SIZES)] * 2


@pytest.mark.parametrize("shape", ["", *SHAPES])
def test_replays_of_a_graph(ranks: Ranks, found: list[list[Path]], shape: str) -> None:
    sizes = (2, 1024, 8190, 256 << 10, (6 << 20) + 14)
    env = {policy.OPTION: shape}
    results = ranks.run(kernel_ranks.replays, NAME, sizes, 200, backend=GPUS, path=found, env=env, deadline_s=280)
    assert results == [200 * len(sizes)] * 2


@pytest.mark.gpus(4)
@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("shape", ["", *policy.ALGORITHMS])
def test_more_ranks(ranks: Ranks, found: list[list[Path]], shape: str, world_size: int) -> None:
    job: dict[str, Any] = {"world_size": world_size, "backend": GPUS, "path": found[:1] * world_size}
    job |= {"env": {policy.OPTION: shape}, "deadline_s": 280}
    sizes = tuple(size for size in SIZES if size <= 8 << 20)  # what the conservative table serves
    assert set(ranks.run(kernel_ranks.sums, NAME, sizes, **job)) == {2 * len(DTYPES) * len(sizes)}
    sizes = (2, 8190, 256 << 10, (6 << 20) + 14)
    assert set(ranks.run(kernel_ranks.replays, NAME, sizes, 50, **job)) == {50 * len(sizes)}
    assert set(ranks.run(kernel_ranks.mixed, NAME, 2000, **job)) == {2000}


def test_calls_on_two_streams_are_ordered(ranks: Ranks, found: list[list[Path]]) -> None:
    ranks.run(kernel_ranks.two_streams, NAME, backend=GPUS, path=found)


def test_a_call_beside_a_capture_that_cant_be_ordered_is_refused(ranks: Ranks, found: list[list[Path]]) -> None:
    for text in ranks.run(kernel_ranks.refused, NAME, backend=GPUS, path=found):
        assert "can't be ordered after it" in text


def test_mixed_calls(ranks: Ranks, found: list[list[Path]]) -> None:
    calls = int(os.environ.get("SOAK_CALLS", "20000"))
    deadline_s = max(200, calls // 2000)
    results = ranks.run(kernel_ranks.mixed, NAME, calls, backend=GPUS, path=found, deadline_s=deadline_s)
    assert results == [calls] * 2


@pytest.mark.parametrize("in_a_replay", [False, True])
def test_a_killed_peer_is_named(ranks: Ranks, found: list[list[Path]], in_a_replay: bool) -> None:
    # NCCL at the route's end would take the process with it.
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "2", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    results = ranks.run(kernel_ranks.killed, NAME, in_a_replay, backend=GPUS, path=found, env=env, dying=[1])
    assert results[1] == DEAD
    assert "rank 1 didn't come within 2 s" in results[0]


@pytest.mark.parametrize(("numels", "dtypes"), kernel_ranks.DIFFERENT_MESSAGES)
def test_ranks_that_come_with_different_messages_time_out(
    ranks: Ranks, found: list[list[Path]], numels: tuple[int, int], dtypes: tuple[str, str]
) -> None:
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "2", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    types = tuple(getattr(torch, dtype) for dtype in dtypes)
    texts = ranks.run(kernel_ranks.differing, NAME, numels, types, backend=GPUS, path=found, env=env)
    assert any("didn't come within 2 s, or called with another size or dtype" in text for text in texts), texts


def test_close_gives_the_memory_back(ranks: Ranks, found: list[list[Path]]) -> None:
    for free in ranks.run(kernel_ranks.closed, NAME, backend=GPUS, path=found):
        assert free[-1] >= free[0] - (8 << 20), free
