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

pytestmark = pytest.mark.gpus(2)
NAME, GPUS = "customar_v1", "cpu:gloo,cuda:nccl"
SIZES = (*(size for size in kernel_ranks.SIZES if size <= policy.MAX_NBYTES), policy.MAX_NBYTES - 2, policy.MAX_NBYTES)
SHAPES = (
    *("one_stage", "one_stage:vecs=4,threads=512,blocks=132", "one_stage:vecs=2,threads=32,blocks=3"),
    *("two_stage", "two_stage:vecs=4,threads=512", "two_stage:vecs=2,threads=128,blocks=77"),
)
SETTINGS = tuple({policy.OPTION: shape} for shape in ("", *SHAPES))
REPLAYED = (2, 1024, 8190, 256 << 10, (6 << 20) + 14)  # bytes
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
    pass


plugin = Plugin()
for name in real.__all__:
    setattr(plugin, name, getattr(real, name))
plugin.connect = connect
"""


@pytest.fixture
def found(tmp_path: Path) -> list[list[Path]]:
    """For each of two ranks the folder in which it finds this plugin alone."""
    return [[install(tmp_path, NAME, "import comm_plugin_customar_v1 as plugin\n")]] * 2


def test_sums_and_replays_of_every_algorithm_have_the_bits_of_the_reference(
    ranks: Ranks, found: list[list[Path]]
) -> None:
    arguments = (SETTINGS, SIZES, REPLAYED, 100)
    results = ranks.run(kernel_ranks.every, NAME, *arguments, backend=GPUS, path=found, deadline_s=280)
    kernel_ranks.check_every(results, *arguments)


def test_a_message_larger_than_the_staging_goes_in_several_launches(ranks: Ranks, found: list[list[Path]]) -> None:
    budget = {"COMM_CORE_MEMORY_BUDGET_NBYTES": str(2 << 20)}
    settings = [{policy.OPTION: shape, **budget} for shape in ("one_stage", "two_stage:threads=128")]
    sizes = (14, 512 << 10, (512 << 10) + 2, (5 << 20) + 46, policy.MAX_NBYTES)
    arguments = (settings, sizes, (), 0)
    results = ranks.run(kernel_ranks.every, NAME, *arguments, backend=GPUS, path=found, deadline_s=280)
    kernel_ranks.check_every(results, *arguments)


@pytest.mark.gpus(4)
def test_four_ranks(ranks: Ranks, found: list[list[Path]]) -> None:
    job: dict[str, Any] = {"world_size": 4, "backend": GPUS, "path": found[:1] * 4, "deadline_s": 280}
    settings = [{policy.OPTION: shape} for shape in ("", "one_stage", "two_stage:vecs=2")]
    arguments = (settings, SIZES, (2, 8190, 256 << 10, (6 << 20) + 14), 50)
    kernel_ranks.check_every(ranks.run(kernel_ranks.every, NAME, *arguments, **job), *arguments)
    for setting in settings:
        assert ranks.run(kernel_ranks.mixed, NAME, 2000, env=setting, **job) == [2000] * 4


def test_a_late_rank_is_named_by_the_waits_of_the_other(ranks: Ranks, found: list[list[Path]]) -> None:
    sizes = (1024, 256 << 10, 4 << 20)
    results = ranks.run(kernel_ranks.late, NAME, sizes, backend=GPUS, path=found, deadline_s=200)
    kernel_ranks.check_late(results, 4 * len(sizes))


def test_mixed_calls(ranks: Ranks, found: list[list[Path]]) -> None:
    calls = kernel_ranks.soak_calls()
    deadline_s = max(200, calls // 2000)
    results = ranks.run(kernel_ranks.mixed, NAME, calls, backend=GPUS, path=found, deadline_s=deadline_s)
    assert results == [calls] * 2


def test_a_killed_peer_is_named_after_a_call_and_after_a_replay(ranks: Ranks, found: list[list[Path]]) -> None:
    # torch.distributed's NCCL, which is connected as the fallback, would end the process.
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "2", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    texts, dead = ranks.run(kernel_ranks.killed, NAME, backend=GPUS, path=found, env=env, dying=[1])
    assert dead == DEAD
    assert len(texts) == 2
    assert all("rank 1 didn't come within 2 s" in text for text in texts), texts


def test_ranks_that_come_with_different_messages_time_out(ranks: Ranks, found: list[list[Path]]) -> None:
    env = {"COMM_CORE_WAIT_TIMEOUT_S": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    results = ranks.run(kernel_ranks.differing, NAME, backend=GPUS, path=found, env=env)
    kernel_ranks.check_differing(results)


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


def serving(nvlink: bool, environ: dict[str, str]) -> dict[str, Any]:
    """Which backend serves and why the others don't, after a sum and the replay of a recorded one."""
    os.environ.update(environ)
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
        "text": handle.explain().partition("calls so far")[0],
    }
    comm.close()
    for variable in environ:
        del os.environ[variable]
    return found


def serving_in_turn(cases: list[tuple[bool, dict[str, str]]]) -> list[dict[str, Any]]:
    return [serving(*case) for case in cases]


# Whether NVML reports NVLink, and variables; what serves then, the verdict on customar_v2, and the text that says why.
SERVING = (
    (True, {}, "customar_v2", "serves", ""),
    (True, {"COMM_CORE_DISABLE": "customar_v2"}, NAME, "blocked", "COMM_CORE_DISABLE"),
    (False, {}, NAME, "unavailable", "have no NVLink between them"),
)
FAILING = ((True, {}, NAME, "failed", "no shared memory today"),)


@pytest.mark.parametrize(("v2", "cases"), [(V2, SERVING), (V2_FAILS, FAILING)])
def test_it_is_never_skipped_on_the_way_from_v2_to_nccl(
    ranks: Ranks, found: list[list[Path]], tmp_path: Path, v2: str, cases: tuple[tuple[Any, ...], ...]
) -> None:
    path = [[*found[0], install(tmp_path / "v2", "customar_v2", v2)]] * 2
    results = ranks.run(serving_in_turn, [case[:2] for case in cases], backend=GPUS, path=path)
    assert results[0] == results[1]
    for case, result in zip(cases, results[0], strict=True):
        *_, name, verdict, reason = case
        assert result["name"] == name, (case, result["text"])
        assert result["verdicts"]["customar_v2"] == verdict, case
        assert reason in result["text"], case
        assert result["order"][0] == name, case
        assert result["order"][-1] == "torch_distributed", case
