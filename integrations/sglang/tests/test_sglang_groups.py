"""Groups of the stand-in for SGLang in real processes, over Gloo: sums, agreement, captures, the end, five reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_ranks
from harness import Ranks, install

# A backend that a group finds beside the fallback; it says what it was asked.
RECORDING = """
import contextlib
import sys
import comm_core
import torch.distributed as dist

events = []

class plugin:
    COMM_HOOK_API = (1, 0)

    @staticmethod
    @comm_core.hookimpl
    def is_available(topology):
        # What these tests sum, so that the admission test is quick.
        return comm_core.Available(500, (comm_core.Range("all_reduce", dtypes=("float32",), max_nbytes=1 << 19),))

    @staticmethod
    @comm_core.hookimpl
    def connect(topology, context):
        return context

    @staticmethod
    @comm_core.hookimpl
    @contextlib.contextmanager
    def capture_ctx(session):
        events.append("enter")
        yield
        events.append("leave")

    @staticmethod
    @comm_core.hookimpl
    def all_reduce(session, tensor, out):
        events.append("sum")
        result = tensor.clone() if out is None else out.copy_(tensor)
        dist.all_reduce(result, group=session.group)
        return result
"""
# One of higher priority, for hardware that isn't there.
ABSENT = """
import comm_core

class plugin:
    COMM_HOOK_API = (1, 0)

    @staticmethod
    @comm_core.hookimpl
    def is_available(topology):
        return comm_core.Unavailable("there is no NVLink")

    @staticmethod
    @comm_core.hookimpl
    def all_reduce(session, tensor, out):
        raise AssertionError("it is unavailable")
"""
# One for ranks of one host.
LOCAL = RECORDING.replace(
    "        return comm_core.Available(500,",
    """        from comm_core import eligibility

        if reason := eligibility.several_hosts(topology):
            return comm_core.Unavailable(reason)
        return comm_core.Available(700,""",
)
Run = Callable[..., list[Any]]


@pytest.fixture
def run(ranks: Ranks, tmp_path: Path) -> Run:
    """A function that runs another on every rank, with the stand-in for SGLang and the backend `recording`."""
    metadata = sglang_ranks.write_metadata(tmp_path / "metadata", "0.5.23")
    folders = [metadata, sglang_ranks.STAND_IN, install(tmp_path / "recording", "recording", RECORDING)]

    def call(function: Callable[..., Any], *arguments: Any, found: dict[str, str] | None = None, **options: Any) -> Any:
        world_size = options.get("world_size", 2)
        more = [tmp_path / name for name in found or ()]
        for folder in more:
            if not folder.exists():
                install(folder, folder.name, (found or {})[folder.name])
        return ranks.run(function, *arguments, path=[[*folders, *more]] * world_size, **options)

    return call


def test_groups_sum_by_the_plan_without_sglangs_buffers(run: Run) -> None:
    for rank, one in enumerate(run(sglang_ranks.serve, world_size=3)):
        lines = one.pop("lines")
        assert one == {
            "class": "CommAllReduce",
            "stock": ["CommAllReduce", "CustomAllReduceV2"],
            "backend": "recording",
            "deterministic": False,
            "events": None,
            "closed": True,
        }
        if rank == 0:
            (line,) = lines
            assert line.startswith("INFO: group 'tp:0': all-reduces by comm-core ")
            assert line.endswith("recording")


def serve_each(names: tuple[str, ...], custom: bool = True) -> dict[str, dict[str, Any]]:
    return {name: sglang_ranks.serve(name, custom) for name in names}


def test_every_group_that_sglang_reduces_in_is_served(run: Run) -> None:
    names = ("attention_tp", "attn_cp", "dcp", "moe_dp", "moe_ep", "moe_tp", "pdmux_prefill_tp")
    for found in run(serve_each, names, False):  # SGLang gives most of them no custom all-reduce
        assert {name: (one["stock"], one["backend"]) for name, one in found.items()} == {
            name: ([], "recording") for name in names
        }


def test_other_groups_stay_sglangs(run: Run) -> None:
    names = ("world", "pp", "self_pp", "tpx")
    for found in run(serve_each, names):
        assert {name: (one["class"], one["events"], one["lines"]) for name, one in found.items()} == {
            name: ("CustomAllReduceV2", ["allocate", "capture"], []) for name in names
        }


def test_comm_sglang_0_switches_everything_off(run: Run) -> None:
    for one in run(sglang_ranks.serve, env={"COMM_SGLANG": "0"}):
        assert (one["class"], one["lines"]) == ("CustomAllReduceV2", [])


def test_deterministic_inference_makes_the_group_deterministic(run: Run) -> None:
    for one in run(sglang_ranks.serve, env={"SGLANG_ENABLE_DETERMINISTIC_INFERENCE": "1"}):
        # The backend of these tests doesn't say how it sums.
        assert (one["class"], one["backend"], one["deterministic"]) == ("CommAllReduce", "torch_distributed", True)
    assert not any(one["deterministic"] for one in run(sglang_ranks.serve))


def test_settings_of_core_that_differ_leave_every_rank_to_sglang(run: Run) -> None:
    envs = [{"COMM_CORE_WAIT_TIMEOUT_S": value} for value in ("10", "20")]
    for one in run(sglang_ranks.serve, env=envs):
        assert one["class"] == "CustomAllReduceV2"
        (line,) = one["lines"]
        assert "COMM_CORE_WAIT_TIMEOUT_S" in line


def test_one_rank_without_the_package_leaves_every_rank_to_sglang(run: Run) -> None:
    (first, lines), (second, silence) = run(sglang_ranks.serve_without_plugin_on, 1, 3.0)
    assert (first, second, silence) == ("CustomAllReduceV2", "CustomAllReduceV2", [])
    (line,) = lines
    assert "rank 1: no vote within 3 s: comm-sglang isn't installed or isn't loaded there" in line


def test_one_rank_without_core_leaves_every_rank_to_sglang(run: Run) -> None:
    for name, (line,) in run(sglang_ranks.serve_without_core_on, 0):
        assert name == "CustomAllReduceV2"
        assert "rank 0: comm_core can't be imported" in line


def test_one_rank_with_a_failed_hook_leaves_every_rank_to_sglang(run: Run) -> None:
    for name, (line,) in run(sglang_ranks.serve_where_a_hook_fails_on, 1):
        assert name == "CustomAllReduceV2"
        assert "rank 1: SGLang hasn't applied the hook on sglang.srt.distributed.parallel_state" in line


def test_a_result_has_the_strides_of_its_input(run: Run) -> None:
    assert run(sglang_ranks.keep_strides) == [(1, 4), (1, 4)]


def test_compiled_calls_become_one_operator(run: Run) -> None:
    for names in run(sglang_ranks.compile_call):
        assert [name for name in names if "all_reduce" in name] == ["comm_core.all_reduce_"], names


def test_captures_under_the_memory_saver_arent_registered(run: Run) -> None:
    assert run(sglang_ranks.memory_saver) == [["enter", "leave"]] * 2
    assert run(sglang_ranks.memory_saver, env={"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1"}) == [[]] * 2


def test_a_failed_capture_leaves_the_next_one_working(run: Run) -> None:
    assert run(sglang_ranks.fail_in_capture) == [["captured"]] * 2


# The five reports.


def test_an_unavailable_backend_is_passed_over_in_captures_too(run: Run) -> None:
    for one in run(sglang_ranks.unavailable, found={"absent": ABSENT}):
        assert one == {"backend": "recording", "reason": True, "is_v2": True, "pushes": False}


def test_a_group_across_two_hosts_loses_only_what_needs_one_host(run: Run) -> None:
    local = {"local": LOCAL}
    inside = run(sglang_ranks.on_two_hosts, [[0, 1], [2, 3]], found=local, world_size=4)
    assert inside == [("local", [])] * 4
    across = run(sglang_ranks.on_two_hosts, [[0, 2], [1, 3]], found=local, world_size=4)
    assert across == [("recording", [])] * 4
    # Only a wish that the group can't have is worth a warning, one a group.
    wish = {"COMM_CORE_BACKENDS": "local"}
    wished = run(sglang_ranks.on_two_hosts, [[0, 2], [1, 3]], found=local, world_size=4, env=wish)
    assert [(name, len(lines)) for name, lines in wished] == [("torch_distributed", 1)] * 2 + [
        ("torch_distributed", 0)
    ] * 2
    assert "its ranks are on 2 hosts" in wished[0][1][0]


def test_a_group_missing_in_sglangs_list_is_captured(run: Run) -> None:
    for one in run(sglang_ranks.capture_unlisted):
        assert one == {"entered": 2, "left": 2, "sums": ["sum"]}


def test_fused_norms_sum_over_a_group_whose_first_rank_isnt_0(run: Run) -> None:
    for rank, one in enumerate(run(sglang_ranks.fuse, [[0, 1], [2, 3]], world_size=4)):
        assert one == {"first": rank // 2 * 2, "prepared": [(2048, 64, "torch.float32")], "workspaces": []}
