"""Real processes over a fake FlashInfer: how the workspace is created, exchanged, grown and freed."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comm_core as comm
import comm_plugin_flashinfer_fusion as plugin
import pytest
import torch
import torch.distributed as dist
from comm_plugin_flashinfer_fusion import policy, session
from fusion_ranks import BUDGET, Member, check, inputs
from harness import Ranks, install

FAKE = Path(__file__).with_name("fake")
CPU = torch.device("cpu")


class Cuda:
    """Whether the stream is being captured, and how much memory is free: set by the test."""

    capturing = False
    free = 1 << 40


@contextlib.contextmanager
def cuda() -> Iterator[type[Cuda]]:
    """Replaces the CUDA functions that a torch without CUDA lacks."""
    Cuda.capturing, Cuda.free = False, 1 << 40
    with (
        mock.patch.object(torch.cuda, "mem_get_info", side_effect=lambda _: (Cuda.free, 1 << 40)),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", side_effect=lambda: Cuda.capturing),
        mock.patch.object(torch.cuda, "current_stream", return_value=SimpleNamespace(cuda_stream=7)),
    ):
        yield Cuda


def fake_state() -> dict[str, Any]:
    import flashinfer.comm

    gc.collect()
    return flashinfer.comm.state


def member_of(ranks: list[int], budget: int = BUDGET) -> Member | None:
    """This rank in a new group; None if it isn't in the group, and has nothing to do."""
    group = dist.new_group(ranks)
    return Member(group, CPU, budget) if dist.get_rank() in ranks else None


def sub_group() -> Any:
    member = member_of([2, 3])
    if member is None:
        return None
    with cuda():
        member.connect()
        first = member.prepare(8, 2048)
        ranges = member.prepare(16, 1024, torch.float16)
        workspace = member.session._workspace.value
        assert workspace.group is member.context.group
        for dtype, shape in ((torch.bfloat16, (8, 2048)), (torch.float16, (16, 1024)), (torch.bfloat16, (3, 4096))):
            tensors = inputs(member.context.rank, 2, shape, CPU, dtype)
            kept = [tensor.clone() for tensor in tensors]
            check(member.fused(*tensors), 2)
            check(member.fused(*tensors, 0.25, 1.0), 2, eps=0.25, offset=1.0)
            assert all(map(torch.equal, tensors, kept))
            results = member.fused(*tensors, 1e-6, 0.0, tensors[0], tensors[1])
            assert results[0] is tensors[0]
            assert results[1] is tensors[1]
            check(results, 2)
        total = plugin.all_reduce(member.session, torch.full((3,), member.context.rank + 1.0), None)
        assert total.tolist() == [3.0] * 3
        found, calls = workspace.found, list(fake_state()["calls"])
        del workspace
        plugin.close(member.session, True)
        plugin.close(member.session, True)
    return {
        "ranges": [[item.to_json() for item in items] for items in (first, ranges)],
        "found": found,
        "calls": calls,
        "live": fake_state()["live"],
        "memory": member.session.memory_nbytes,
    }


def test_a_sub_group_that_doesnt_start_at_rank_0(ranks: Ranks) -> None:
    *others, one, two = ranks.run(sub_group, world_size=4, path=[[FAKE]] * 4)
    assert others == [None, None]
    assert one == two
    # Each rank has received every rank's data, by group rank; a root is a group rank.
    exchange = [("rank 0/fd.sock", "rank 1/fd.sock"), (b"\0\xff\2", b"\1\xff\3"), ("root", 2), ("root", 3)]
    assert one["found"] == exchange * 3
    # The second shape has as many elements: it fits into the first one's workspace.
    assert one["calls"][0] == "create"
    assert one["calls"].count("create") == 1
    assert len(one["calls"]) == 1 + 9
    assert one["live"] == 0
    mine = {"op": "all_reduce_add_rms_norm", "device_types": ("cuda",), "max_nbytes": 32768, "prepared": True}
    bfloat16 = mine | {"dtypes": ("bfloat16",), "max_tokens": 8, "hidden_multiple": 2048}
    float16 = mine | {"dtypes": ("float16",), "max_tokens": 16, "hidden_multiple": 1024}
    assert one["ranges"] == [[bfloat16], [bfloat16, float16]]
    assert one["memory"] == policy.workspace_nbytes(2, 8 * 2048)


def handles() -> int:
    """Return how many descriptors of the file that stands for a memory handle are open."""
    return sum(link.resolve() == Path(os.devnull) for link in Path("/proc/self/fd").iterdir())


def starved() -> Any:
    member = member_of([1, 2])
    if member is None:
        return None
    with cuda():
        member.connect()
        before = handles()
        outcome = member.prepare(8, 2048)
        live = fake_state()["live"], handles() - before
        plugin.close(member.session, False)
        # Another session works.
        with mock.patch.dict("os.environ", {"FAKE_MEMORY": ""}):
            member.connect()
            ranges = member.prepare(8, 2048)
            check(member.fused(*inputs(member.context.rank, 2, (8, 2048), CPU)), 2)
            plugin.close(member.session, True)
    return outcome, live, len(ranges), fake_state()["live"]


@pytest.mark.parametrize("buffers", [0, 3])
def test_if_one_rank_has_too_little_memory_all_fall_back_and_free_theirs(ranks: Ranks, buffers: int) -> None:
    # One rank has memory for this many of the three buffers, but not for the flags after them. Its peer is then in the
    # middle of the exchange.
    memory = sum((65536, 2048, 3 * 65536)[:buffers])
    env = [{}, {}, {"FAKE_MEMORY": str(memory)}]
    _, *results = ranks.run(starved, world_size=3, path=[[FAKE]] * 3, env=env)
    for outcome, live, ranges, left in results:
        failed, reason, rank = outcome
        assert (failed, rank) == ("failed", 1)
        assert "FlashInfer couldn't create a workspace for messages of [8, 2048]: RuntimeError: CUDA_ERROR" in reason
        # On the other rank, too: it has no workspace that one rank lacks.
        assert (live, ranges, left) == ((0, 0), 1, 0)


def full() -> Any:
    member = member_of([0, 1])
    assert member is not None
    with cuda() as state:
        member.connect()
        assert member.prepare(8, 1024) is not None
        if member.context.rank == 1:
            state.free = 6 << 20
        outcome = member.prepare(1024, 1024)
        plugin.close(member.session, False)
    return outcome, fake_state()["calls"], fake_state()["live"]


def test_too_little_free_memory_is_noticed_before_flashinfer_is_called(ranks: Ranks) -> None:
    for (failed, reason, rank), calls, live in ranks.run(full, path=[[FAKE]] * 2):
        assert (failed, rank) == ("failed", 1)
        assert "a workspace for messages of 2097152 bytes needs 23068672, and the device has 6291456 free" in reason
        assert (calls, live) == (["create"], 0)


def no_kernels() -> Any:
    group = dist.group.WORLD
    assert group is not None
    return Member(group, CPU).connect()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("FAKE_BUILD", "fails", "ninja: build stopped"), ("FAKE_CONFIDENTIAL", "1", "confidential computing")],
)
def test_a_failure_of_one_rank_is_every_ranks_reason(ranks: Ranks, variable: str, value: str, reason: str) -> None:
    for failed, text, rank in ranks.run(no_kernels, path=[[FAKE]] * 2, env=[{}, {variable: value}]):
        assert (failed, rank) == ("failed", 1)
        assert reason in text


def grown() -> Any:
    member = member_of([0, 1], 40 << 20)
    assert member is not None
    needed = [policy.workspace_nbytes(2, tokens * 1024) for tokens in (8, 64, 512)]
    allocated = [2 * tokens * 1024 * 2 * 4 + 2048 + 20 for tokens in (8, 64, 512)]
    with cuda() as state:
        member.connect()

        def call(tokens: int) -> None:
            check(member.fused(*inputs(member.context.rank, 2, (tokens, 1024), CPU)), 2)

        assert member.prepare(8, 1024) is not None
        call(8)
        # The smaller one is freed before the larger one is created.
        assert member.prepare(64, 1024) is not None
        state_now = fake_state()
        assert (state_now["live"], state_now["peak"]) == (allocated[1], allocated[1])
        assert member.session.memory_nbytes == needed[1]
        for unchanged in ((64, 1024, torch.bfloat16), (9, 1024, torch.bfloat16), (8, 1024, torch.float32)):
            assert member.prepare(*unchanged) is None
        # More tokens of a smaller hidden size need no larger workspace.
        assert member.prepare(128, 512) is not None
        assert fake_state()["calls"].count("create") == 2
        # A graph has recorded its kernel, so it is kept.
        state.capturing = True
        call(64)
        state.capturing = False
        older = member.session._workspace.value
        ranges = member.prepare(512, 1024)
        assert {(item.hidden_multiple, item.max_tokens) for item in ranges} == {(1024, 512), (512, 128)}
        call(512)
        assert member.session._workspace.value is not older
        assert hasattr(older, "ipc_handles")
        assert fake_state()["live"] == allocated[1] + allocated[2]
        assert member.session.memory_nbytes == needed[1] + needed[2]
        # The budget has no space for a third workspace.
        full = member.prepare(4096, 1024)
        del older
        plugin.close(member.session, True)
    return full, fake_state()["live"]


def test_it_grows_and_keeps_a_workspace_that_a_graph_may_replay(ranks: Ranks) -> None:
    for (failed, reason, _), live in ranks.run(grown, path=[[FAKE]] * 2):
        assert (failed, live) == ("failed", 0)
        assert "beside 6291456 that recorded graphs still use, and the budget is 41943040" in reason


def beyond() -> Any:
    member = member_of([0, 1], policy.workspace_nbytes(2, 8 * 1024))
    assert member is not None
    rank = member.context.rank
    with cuda():
        member.connect()
        # No range serves these calls, but their results are right: before there is a workspace, and beyond it.
        check(member.fused(*inputs(rank, 2, (4, 1024), CPU)), 2)
        assert [member.prepare(*shape) for shape in ((8, 1001), (8, 8 * 1025), (64, 1 << 23))] == [None] * 3
        assert member.prepare(8, 1024) is not None
        for shape, dtype in (((9, 1024), torch.bfloat16), ((4, 1001), torch.float16), ((4, 1024), torch.float32)):
            tensors = inputs(rank, 2, shape, CPU, dtype)
            check(member.fused(*tensors), 2)
            results = member.fused(*tensors, 1e-6, 0.0, tensors[0], tensors[1])
            assert results[0] is tensors[0]
            check(results, 2)
        assert fake_state()["calls"] == ["create"]
        check(member.fused(*inputs(rank, 2, (8, 1024), CPU)), 2)
        assert fake_state()["calls"] == ["create", (8, 1024)]
        # It was used, so its kernel may still run.
        kept = list(session._kept_until_exit)
        outcome = member.prepare(1024, 1024)
        plugin.close(member.session, False)
        assert len(session._kept_until_exit) == len(kept) + 1
        session._kept_until_exit[:] = kept
    return outcome


def test_calls_it_cant_serve_are_composed_and_shapes_over_budget_are_refused(ranks: Ranks) -> None:
    for failed, reason, _ in ranks.run(beyond, path=[[FAKE]] * 2):
        assert failed == "failed"
        assert "a workspace for messages of 2097152 bytes needs 23068672, and the budget is 6291456" in reason
        assert "COMM_CORE_MEMORY_BUDGET_NBYTES" in reason


def without() -> tuple[str, str, str, str]:
    backend = comm.get_backend()
    x = torch.full((4, 64), dist.get_rank() + 1.0)
    y, s = backend.all_reduce_add_rms_norm(x, x * 0, torch.ones(64))
    assert torch.equal(s, torch.full((4, 64), 3.0))
    torch.testing.assert_close(y, torch.ones(4, 64))
    candidate = backend.decision.candidate("flashinfer_fusion")
    assert candidate is not None
    explained = backend.explain()
    comm.close()
    return backend.name, candidate.verdict, candidate.reason, explained


def test_without_flashinfer_the_reason_says_so_and_another_backend_serves(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path, "flashinfer_fusion", "import comm_plugin_flashinfer_fusion as plugin\n")
    other = """
import comm_core as comm
from comm_core import fallback

class plugin:
    COMM_HOOK_API = (1, 0)
    @staticmethod
    @comm.hookimpl
    def all_reduce(session, tensor, out):
        return fallback.torch_distributed(session.group, tensor, out)
"""
    install(tmp_path, "other", other)
    missing = "flashinfer isn't installed: pip install 'flashinfer-python>=0.7.1'"
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert plugin.probe() == {"missing": missing, "version": None}
    for name, verdict, reason, explained in ranks.run(without, path=[[folder]] * 2):
        assert (name, verdict) == ("other", "unavailable")
        assert reason == "it sums CUDA tensors, and this group has none"
        assert reason in explained
