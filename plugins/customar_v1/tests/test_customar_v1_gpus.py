"""The kernels on GPUs: exact sums, also in graphs; bounded waits for a peer that is gone; when they serve."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any
from unittest import mock

import comm_core as comm
import kernel_ranks
import pytest
import torch
import torch.distributed as dist
from comm_core._probe import nvml
from comm_plugin_customar_v1 import policy
from harness import DEAD, Ranks, install
from kernel_ranks import DTYPES

pytestmark = pytest.mark.gpus(2)
NAME, GPUS = "customar_v1", "cpu:gloo,cuda:nccl"
SIZES = (*(size for size in kernel_ranks.SIZES if size <= policy.MAX_NBYTES), policy.MAX_NBYTES - 2, policy.MAX_NBYTES)
SHAPES = (
    *("one_stage", "one_stage:vecs=4,threads=512,blocks=132", "one_stage:vecs=2,threads=32,blocks=3"),
    *("two_stage", "two_stage:vecs=4,threads=512", "two_stage:vecs=2,threads=128,blocks=77"),
)
# customar_v2 unchanged, and a customar_v2 that can't connect on the second rank.
V2 = "import comm_plugin_customar_v2 as plugin\n"
V2_FAILS = """
import comm_core as comm
import comm_plugin_customar_v2 as real


@comm.hookimpl
def connect(topology, context):
    if context.rank == 1:
        raise RuntimeError("no shared memory today")
    return real.connect(topology, context)


class Plugin:
    COMM_HOOK_API = real.COMM_HOOK_API


plugin = Plugin()
for name in ("probe", "is_available", "all_reduce", "all_reduce_add_rms_norm", "check", "suspend", "resume", "close"):
    setattr(plugin, name, getattr(real, name))
plugin.connect = connect
"""


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """For each of two ranks the folder in which it finds this plugin alone."""
    return [[install(tmp_path, NAME, "import comm_plugin_customar_v1 as plugin\n")]] * 2


@pytest.mark.parametrize("shape", ["", *SHAPES])
def test_sums_have_the_bits_of_the_reference(ranks: Ranks, found: list[list[Path]], shape: str) -> None:
    env = {policy.OPTION: shape}
    results = ranks.run(kernel_ranks.sums, NAME, SIZES, backend=GPUS, path=found, env=env, deadline_s=280)
    assert results == [2 * len(DTYPES) * len(SIZES)] * 2


@pytest.mark.parametrize("shape", ["one_stage", "two_stage:threads=128"])
def test_a_message_larger_than_the_staging_goes_in_several_launches(
    ranks: Ranks, found: list[list[Path]], shape: str
) -> None:
    env = {policy.OPTION: shape, "COMM_CORE_MEMORY_BUDGET_NBYTES": str(2 << 20)}
    sizes = (14, 512 << 10, (512 << 10) + 2, (5 << 20) + 46, policy.MAX_NBYTES)
    results = ranks.run(kernel_ranks.sums, NAME, sizes, backend=GPUS, path=found, env=env, deadline_s=280)
    assert results == [2 * len(DTYPES) * len(sizes)] * 2


@pytest.mark.parametrize("shape", ["", *SHAPES])
def test_replays_of_a_graph(ranks: Ranks, found: list[list[Path]], shape: str) -> None:
    sizes = (2, 1024, 8190, 256 << 10, (6 << 20) + 14)
    env = {policy.OPTION: shape}
    results = ranks.run(kernel_ranks.replays, NAME, sizes, 200, backend=GPUS, path=found, env=env, deadline_s=280)
    assert results == [200 * len(sizes)] * 2


def forced() -> list[str]:
    handle = kernel_ranks.backend(NAME)
    session: Any = handle._serving.sessions[NAME].value
    algorithms = [session.algorithm_of(nbytes) for nbytes in (16, 1 << 20, policy.MAX_NBYTES)]
    comm.close()
    return algorithms


@pytest.mark.gpus(4)
@pytest.mark.parametrize("shape", ["", "one_stage", "two_stage:vecs=2"])
def test_four_ranks(ranks: Ranks, found: list[list[Path]], shape: str) -> None:
    job: dict[str, Any] = {"world_size": 4, "backend": GPUS, "path": found[:1] * 4}
    job |= {"env": {policy.OPTION: shape}, "deadline_s": 280}
    assert ranks.run(kernel_ranks.sums, NAME, SIZES, **job) == [2 * len(DTYPES) * len(SIZES)] * 4
    sizes = (2, 8190, 256 << 10, (6 << 20) + 14)
    assert ranks.run(kernel_ranks.replays, NAME, sizes, 50, **job) == [50 * len(sizes)] * 4
    assert ranks.run(kernel_ranks.mixed, NAME, 2000, **job) == [2000] * 4


@pytest.mark.parametrize("algorithm", policy.ALGORITHMS)
def test_an_algorithm_that_is_forced_serves_every_size(ranks: Ranks, found: list[list[Path]], algorithm: str) -> None:
    results = ranks.run(forced, backend=GPUS, path=found, env={policy.OPTION: algorithm})
    assert results == [[algorithm] * 3] * 2


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
    # torch.distributed's NCCL, which is connected as the fallback, would end the process.
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
        # Less than one of the 18 MiB buffers.
        assert free[-1] >= free[0] - (8 << 20), free


def test_a_suspension_gives_the_memory_back_and_graphs_replay_after_it(ranks: Ranks, found: list[list[Path]]) -> None:
    for freed in ranks.run(kernel_ranks.slept, NAME, (7, 4096, 3 << 20), backend=GPUS, path=found):
        assert all(nbytes >= 18 << 20 for nbytes in freed), freed


def expandable() -> None:
    """The caller's tensors are in segments of virtual memory; the backend's buffers don't come from torch."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        kernel_ranks.sums(NAME, (14, 8192, (4 << 20) + 46))
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        torch.cuda.empty_cache()  # a segment that is left would change a later test's topology


def test_expandable_segments_dont_matter(ranks: Ranks, found: list[list[Path]]) -> None:
    ranks.run(expandable, backend=GPUS, path=found)


def wrong_data() -> dict[str, str]:
    """The second rank compares the test pages with other seeds, so they seem wrong."""
    from comm_plugin_customar_v1 import session

    class OtherSeeds(session.Session):
        def __init__(self, native: session.Native, *arguments: Any) -> None:
            read = native.read_test_pages
            spoilt = native._replace(read_test_pages=lambda seeds: read([seed ^ 1 for seed in seeds]))
            super().__init__(spoilt, *arguments)

    with mock.patch.object(session, "Session", OtherSeeds if dist.get_rank() == 1 else session.Session):
        handle = comm.get_backend()
    x = torch.ones(64, device="cuda")
    assert torch.equal(handle.all_reduce(x), 2 * x)
    reason = next(item.reason for item in handle.decision.candidates if item.name == NAME)
    comm.close()
    return {"name": handle.name, "reason": reason}


def test_wrong_data_drops_the_backend_on_all_ranks(ranks: Ranks, found: list[list[Path]]) -> None:
    for result in ranks.run(wrong_data, backend=GPUS, path=found):
        assert result["name"] == "torch_distributed"
        assert "rank 1: the driver reports peer access, but 1024 of 1024 words" in result["reason"]


def serving(nvlink: bool) -> dict[str, Any]:
    """Which backend serves and why the others don't, after a sum and the replay of a recorded one."""
    link = nvml._link
    if not nvlink:

        def without(*arguments: Any) -> comm.Link:
            return dataclasses.replace(link(*arguments), nvlinks=0, reason="NVML: P2P_STATUS_NOT_SUPPORTED")

        nvml._link = without
    try:
        handle = comm.get_backend()
    finally:
        nvml._link = link
    x = torch.full((4096,), dist.get_rank() + 1.0, device="cuda")
    assert torch.equal(handle.all_reduce(x), torch.full_like(x, 3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = handle.all_reduce(x)
    x.add_(1)
    graph.replay()
    assert torch.equal(y, torch.full_like(y, 5))
    handle.check()
    found = {
        "name": handle.name,
        "verdicts": {item.name: item.verdict for item in handle.decision.candidates},
        "order": [rule.backend for rule in handle.decision.route("all_reduce", "eager", "cuda", "float32").rules],
        "text": handle.explain(),
    }
    comm.close()
    return found


@pytest.mark.parametrize(
    ("v2", "env", "nvlink", "name", "verdict", "reason"),
    [
        (V2, {}, True, "customar_v2", "serves", ""),
        (V2, {"COMM_CORE_DISABLE": "customar_v2"}, True, NAME, "blocked", "COMM_CORE_DISABLE"),
        (V2_FAILS, {}, True, NAME, "failed", "no shared memory today"),
        (V2, {}, False, NAME, "unavailable", "have no NVLink between them"),
    ],
)
def test_it_is_never_skipped_on_the_way_from_v2_to_nccl(
    ranks: Ranks,
    found: list[list[Path]],
    tmp_path: Path,
    v2: str,
    env: dict[str, str],
    nvlink: bool,
    name: str,
    verdict: str,
    reason: str,
) -> None:
    path = [[*found[0], install(tmp_path / "v2", "customar_v2", v2)]] * 2
    results = ranks.run(serving, nvlink, backend=GPUS, path=path, env=env)
    assert results[0] == results[1]
    assert results[0]["name"] == name, results[0]["text"]
    assert results[0]["verdicts"]["customar_v2"] == verdict
    assert reason in results[0]["text"]
    assert results[0]["order"][0] == name
    assert results[0]["order"][-1] == "torch_distributed"
