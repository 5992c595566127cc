"""Groups of vLLM in real processes, over Gloo: sums, agreement, captures, sleep and the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm_ranks
from harness import Ranks, install

# A backend that a group finds beside the fallback, to see that it is asked.
ADDING = """
import comm_core
import torch
import torch.distributed as dist

class plugin:
    COMM_HOOK_API = (1, 0)

    @staticmethod
    @comm_core.hookimpl
    def is_available(topology):
        # What these tests sum, so that the admission test is quick.
        return comm_core.Available(500, (comm_core.Range("all_reduce", dtypes=("float32",), max_nbytes=1 << 19),))

    @staticmethod
    @comm_core.hookimpl
    def all_reduce(session, tensor, out):
        result = tensor.clone() if out is None else out.copy_(tensor)
        dist.all_reduce(result, group=session.group)
        return result
"""


@pytest.fixture
def run(ranks: Ranks, tmp_path: Path) -> Callable[..., list[Any]]:
    """A function that runs another on every rank, with the stand-in for vLLM and the backend `adding`."""
    found = install(tmp_path / "found", "adding", ADDING)

    def call(function: Callable[..., Any], *arguments: Any, platform: str = "cpu", **options: Any) -> list[Any]:
        world_size = options.get("world_size", 2)
        env = {"STAND_IN_PLATFORM": platform, **options.pop("env", {})}
        path = [[vllm_ranks.STAND_IN, found]] * world_size
        return ranks.run(function, *arguments, env=env, path=path, **options)

    return call


Run = Callable[..., list[Any]]


def test_cpu_groups_sum_in_place_by_the_plan(run: Run) -> None:
    found = run(vllm_ranks.serve, world_size=3)
    for rank, one in enumerate(found):
        lines = one.pop("lines")
        assert one == {
            "class": "CommCpuCommunicator",
            "handle": True,
            "backend": "adding",
            "deterministic": False,
            "in_place": True,
            "stock_calls": 0,
            "buffers": None,
            "closed": True,
            "destroyed": "destroy",
        }
        (line,) = lines if rank == 0 else [""]
        assert (rank > 0) or (
            line.startswith("INFO: group 'tp:0': all-reduces by comm-core ") and line.endswith("adding")
        )


def test_cuda_groups_sum_out_of_place_without_vllms_buffers(run: Run) -> None:
    for one in run(vllm_ranks.serve, platform="cuda"):
        assert (one["class"], one["handle"], one["in_place"]) == ("CommCudaCommunicator", True, False)
        assert (one["buffers"], one["stock_calls"], one["closed"]) == ([], 0, True)


def serve_each(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {name: vllm_ranks.serve(name) for name in names}


def test_every_group_that_vllm_reduces_in_is_served(run: Run) -> None:
    for found in run(serve_each, ("dcp", "etp"), platform="cuda"):
        assert {name: one["handle"] for name, one in found.items()} == {"dcp": True, "etp": True}


def test_other_groups_stay_vllms(run: Run) -> None:
    names = ("pp", "ep", "dp", "edp", "tpx")
    for found in run(serve_each, names, platform="cuda"):
        assert {name: (one["handle"], one["stock_calls"], one["lines"]) for name, one in found.items()} == {
            name: (False, 4, []) for name in names
        }


def test_batch_invariance_makes_the_group_deterministic(run: Run) -> None:
    for one in run(vllm_ranks.serve, platform="cuda", env={"VLLM_BATCH_INVARIANT": "1"}):
        assert (one["handle"], one["deterministic"], one["stock_calls"], one["buffers"]) == (True, True, 0, [])
        # The backend of these tests doesn't say how it sums.
        assert one["backend"] == "torch_distributed"
    assert not any(one["deterministic"] for one in run(vllm_ranks.serve, platform="cuda"))


def test_settings_of_core_that_differ_leave_every_rank_to_vllm(ranks: Ranks) -> None:
    envs = [{"STAND_IN_PLATFORM": "cpu", "COMM_CORE_WAIT_TIMEOUT_S": value} for value in ("10", "20")]
    for one in ranks.run(vllm_ranks.serve, env=envs, path=[[vllm_ranks.STAND_IN]] * 2):
        assert (one["handle"], one["stock_calls"]) == (False, 4)
        (line,) = one["lines"]
        assert "COMM_CORE_WAIT_TIMEOUT_S" in line


def test_one_rank_without_the_package_leaves_every_rank_to_vllm(run: Run) -> None:
    (first, lines, calls), (second, silence, others) = run(vllm_ranks.serve_without_plugin_on, 1, 3.0)
    assert (first, second, calls, others) == ("CommCpuCommunicator", "CpuCommunicator", 1, 1)
    assert silence == []
    (line,) = lines
    assert "rank 1: no vote within 3 s: comm-vllm isn't installed or isn't loaded there" in line


def test_one_rank_without_core_leaves_every_rank_to_vllm(run: Run) -> None:
    found = run(vllm_ranks.serve_without_core_on, 0, platform="cuda")
    assert [handle for handle, _ in found] == [False, False]
    for _, (line,) in found:
        assert "rank 0: comm_core can't be imported" in line


def test_a_result_has_the_strides_of_its_input(run: Run) -> None:
    assert run(vllm_ranks.keep_strides, platform="cuda") == [(1, 4), (1, 4)]


def test_captures_prepare_once_and_nest(run: Run) -> None:
    once = ["prepare 16 64 torch.bfloat16", "enter", "enter", "captured", "leave", "leave"]
    assert run(vllm_ranks.capture, {}, ("tp", "dcp"), platform="cuda") == [once * 2] * 2


def test_captures_into_a_pool_that_sleeps_arent_registered(run: Run) -> None:
    once = ["prepare 16 64 torch.bfloat16", "captured"]
    assert run(vllm_ranks.capture, {"graphs_sleep": True}, ("tp",), platform="cuda") == [once * 2] * 2


def test_vllms_custom_all_reduce_can_be_kept_for_its_gathers(run: Run) -> None:
    kept = run(vllm_ranks.capture_with_custom, platform="cuda", env={"COMM_VLLM_KEEP_CUSTOM": "1"})
    assert kept == [(["capture"], False, ["custom"], True)] * 2


def test_a_failed_capture_leaves_the_next_one_working(run: Run) -> None:
    assert run(vllm_ranks.fail_in_capture, platform="cuda") == [["captured"]] * 2


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_sleep_suspends_the_handle(run: Run, platform: str) -> None:
    assert run(vllm_ranks.sleep, platform=platform) == [["suspend", "resume", "suspended"]] * 2


def test_compiled_graphs_with_cores_operators_have_a_key_of_their_own(run: Run) -> None:
    for *engines, (left, _) in run(vllm_ranks.compile_keys, False):
        assert [added for added, _ in engines] == [{("COMM_VLLM", f"tp all_reduce {name}")} for _, name in engines]
        assert left == set()
    for *engines, (left, _) in run(vllm_ranks.compile_keys, True, platform="cuda"):
        key = "tp all_reduce_add_rms_norm"
        assert [added for added, _ in engines] == [{("COMM_VLLM", f"{key} {name}")} for _, name in engines]
        assert left == set()
    unchanged = [
        *run(vllm_ranks.compile_keys, False, platform="cuda"),
        *run(vllm_ranks.compile_keys, True, platform="cuda", env={"COMM_VLLM_FUSED": "0"}),
    ]
    assert [added for found in unchanged for added, _ in found] == [set()] * 12


def test_compiled_calls_become_one_operator(run: Run) -> None:
    for names in run(vllm_ranks.compile_call):
        assert [name for name in names if "all_reduce" in name] == ["comm_core.all_reduce_"], names


def test_stateless_groups_are_declined_alone(run: Run) -> None:
    assert run(vllm_ranks.stateless) == [(True, 0)] * 2


def test_process_groups_may_be_destroyed_first(run: Run) -> None:
    assert run(vllm_ranks.destroyed_before) == ["destroy"] * 2
