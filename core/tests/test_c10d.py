"""`init_process_group("comm")`: programs for torch.distributed get the handle's sums, and torch's own of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import c10d_groups
import c10d_ranks
import pytest
import torch.distributed as dist
from comm_core._c10d import process_group

if TYPE_CHECKING:
    from harness import Ranks

SHM = {"COMM_CORE_BACKENDS": "shm"}

# The calls that the handle serves in each case of c10d_ranks.py; the others are served by torch's own backends.
SERVED = {
    "sum": 1,
    **{f"sum of {name}": 1 for name in ("float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8")},
    "average": 1,
    "maximum": 0,
    "minimum": 0,
    "product": 0,
    "bitwise or": 0,
    "asynchronous": 1,
    "a message between": 1,
    "several in flight": 21,
    "future": 1,
    "complex": 1,
    "transposed": 1,
    "empty": 1,
    "parameter": 1,
    "sparse": 0,
    "overlapping": 0,
    "coalesced": 2,
    "by the group's method": 4,
    "broadcast": 0,
    "reduce": 0,
    "all_gather": 0,
    "gather and scatter": 0,
    "reduce_scatter": 0,
    "all_to_all_single": 0,
    "barrier": 0,
    "send and recv": 0,
    "objects": 0,
    "functional.all_reduce": 1,
    "functional average": 1,
    "functional.all_reduce_coalesced": 2,
    "functional.all_gather_tensor": 0,
    "compiled functional": 1,
    "compiled all_reduce": 1,
    "init_device_mesh": 1,
    "DTensor": 2,
    "parallelize_module": 1,
    "DistributedDataParallel": 3,
    "DistributedDataParallel, a hook": 3,
    "fully_shard": 1,
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_operation_is_right_and_sums_go_to_the_handle(ranks: Ranks, world_size: int) -> None:
    for served in ranks.run(
        c10d_ranks.served_by_case, world_size=world_size, backend="comm", env=SHM, installed=True, deadline_s=240
    ):
        assert served == SERVED


def test_groups_have_handles_of_their_own(ranks: Ranks) -> None:
    for found in ranks.run(c10d_groups.groups, world_size=3, backend="comm", env=SHM, installed=True):
        assert found["sums"] == found["expected"]
        kinds = {name: "gloo" if name == "gloo" else "comm" for name in found["sums"]}
        assert found["kinds"] == kinds
        assert (found["handles"], found["config"], found["operator"]) == ("shm", "cpu:comm,cuda:comm", True)
        # Of the world, and of the group of one rank, which isn't destroyed.
        assert found["left"] == [False, True]


@pytest.mark.parametrize("backend", ["cpu:comm,cuda:comm", "cpu:gloo,cuda:comm"])
def test_other_names_of_the_backend(ranks: Ranks, backend: str) -> None:
    assert ranks.run(c10d_groups.again, backend, backend="comm", env=SHM, installed=True) == [[3.0] * 3] * 2


def test_ranks_that_cant_negotiate_are_served_by_torch_alone(ranks: Ranks) -> None:
    differ = [{"COMM_CORE_DISABLE": "shm"}, {}]
    for found in ranks.run(c10d_groups.alone_after_a_failure, backend="comm", env=differ, installed=True):
        assert found == {"sum": 3.0, "handle": None, "states": 0}


def test_a_group_whose_rank_is_killed_raises(ranks: Ranks) -> None:
    limits = {**SHM, "COMM_CORE_WAIT_TIMEOUT_S": "5"}
    error, _ = ranks.run(c10d_groups.a_peer_is_killed, backend="comm", env=limits, installed=True, dying=[1])
    assert "rank 1" in error


def test_a_closed_group_is_served_by_torch_until_it_gets_a_handle_again(ranks: Ranks) -> None:
    found = ranks.run(c10d_groups.closed_and_reopened, backend="comm", env=SHM, installed=True)
    assert found == [[(3.0, 1), (3.0, 1)] * 2] * 2


def test_a_rank_that_fails_after_the_negotiation_keeps_nobody_waiting(ranks: Ranks) -> None:
    env = {**SHM, "COMM_CORE_CONTROL_TIMEOUT_S": "1000"}
    found = ranks.run(c10d_groups.one_rank_gets_no_handle, world_size=3, backend="comm", env=env, installed=True)
    assert found == [(6.0, True)] * 3


def test_ranks_agree_on_torchs_own_backends(ranks: Ranks) -> None:
    assert ranks.run(c10d_groups.one_rank_has_no_nccl, backend="comm", env=SHM, installed=True) == [3.0] * 2


@pytest.mark.parametrize("who", ["others", "a_thread"])
def test_an_abort_ends_sums_and_drops_the_handle(ranks: Ranks, who: str) -> None:
    env = {**SHM, "COMM_CORE_CONTROL_TIMEOUT_S": "1000", "COMM_CORE_WAIT_TIMEOUT_S": "1000"}
    function = {"others": c10d_groups.aborted_while_others_wait, "a_thread": c10d_groups.aborted_while_a_thread_waits}
    first, second = ranks.run(function[who], backend="comm", env=env, installed=True)
    assert first == ("CommError", [])
    assert second == ("", [])


def test_a_group_that_one_rank_destroys_doesnt_wait_forever(ranks: Ranks) -> None:
    env = {**SHM, "COMM_CORE_CONTROL_TIMEOUT_S": "2"}
    assert ranks.run(c10d_groups.destroyed_by_one_rank, backend="comm", env=env, installed=True) == [True] * 2


def test_a_works_wait_takes_a_timeout(ranks: Ranks) -> None:
    first, second = ranks.run(c10d_groups.a_wait_with_a_timeout, backend="comm", env=SHM, installed=True)
    assert first == ("CommTimeoutError", False, 3.0, True)
    assert second == ("", False, 3.0, True)


def test_threads_that_sum_at_once_take_turns(ranks: Ranks) -> None:
    for right, failure in ranks.run(c10d_groups.two_threads, backend="comm", env=SHM, installed=True):
        assert (right, failure) == ([True] * 400, None)


def test_averages_are_rounded_as_gloos(ranks: Ranks) -> None:
    for found in ranks.run(c10d_groups.averages, backend="comm", env=SHM, installed=True):
        assert len(found) == 3
        for ours, gloos in found:
            assert ours == gloos


@pytest.mark.parametrize("deterministic", ["0", "1"])
def test_sums_by_torch_and_other_collectives_begin_in_one_order_on_all_ranks(ranks: Ranks, deterministic: str) -> None:
    env = {"COMM_CORE_DISABLE": "shm", "COMM_CORE_DETERMINISTIC": deterministic}
    for found in ranks.run(c10d_groups.collectives_beside_late_sums, backend="comm", env=env, installed=True):
        assert len(found) == 11
        assert all(found.values()), found


# Prints what torch has registered and imported of core. Then four processes sum and end, all forked by one, as torch's
# import takes longest.
SUMS_AND_END = """
import os, sys, torch, torch.distributed as dist
ours = sorted(name for name in sys.modules if name.startswith(("comm_core.", "_comm_core")))
print(dist.Backend.COMM, *ours, flush=True)
children = {}
for destroys in (True, False) * 2:
    child = os.fork()
    if not child:
        break
    children[child] = "with" if destroys else "without"
else:
    for child, how in children.items():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            print(how, "destroy_process_group:", status)
    sys.exit()
dist.init_process_group("comm", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(3):
    dist.all_reduce(torch.ones(8), async_op=True).wait()
if destroys:
    dist.destroy_process_group()
"""


def test_torch_imports_little_of_core_and_processes_end_well_after_asynchronous_sums() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SUMS_AND_END],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "comm _comm_core_torch\n", "")


def test_torch_registers_the_backend_after_an_import_of_core() -> None:
    program = "import comm_core, torch.distributed as dist; print(dist.Backend.COMM)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "comm\n", "")


@pytest.mark.skipif(
    not hasattr(dist.Backend, "_ensure_backend_registered"), reason="torch before 2.14 has no entry points of backends"
)
def test_newer_torch_registers_the_backend_when_it_is_asked_for() -> None:
    program = (
        "import torch.distributed as dist; assert 'COMM' not in dist.Backend._plugins; "
        "dist.init_process_group('comm', store=dist.HashStore(), rank=0, world_size=1); print(dist.get_backend())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.stdout.strip() == "comm", done.stderr


def test_every_method_of_a_process_group_is_delegated_or_its_own() -> None:
    """torch's C++ may call any of them by Python: see process_group.py."""
    for name in dir(dist.ProcessGroup):
        method = getattr(dist.ProcessGroup, name)
        if not name.startswith("__") and callable(method) and not isinstance(method, type):
            own = name in process_group._OWN
            delegated = getattr(process_group.CommProcessGroup, name).__module__ == process_group.__name__
            assert own or delegated, name


def test_every_delegated_method_is_a_collective_a_message_or_local() -> None:
    messages = {"send", "recv", "recv_anysource"}
    local = {
        *("_device_types", "_enable_collectives_timing", "_get_sequence_number_for_group", "get_group_store"),
        *("_register_on_completion_hook", "_set_sequence_number_for_group", "_wait_for_pending_works"),
        *("_start_coalescing", "_end_coalescing", "set_timeout", "use_pg_for_symm_mem_rendezvous"),
    }
    groups = {"split_group", "merge_remote_group"}  # torch refuses both on this backend
    known = process_group.COLLECTIVES | messages | local | groups | process_group._OWN
    for name in dir(dist.ProcessGroup):
        method = getattr(dist.ProcessGroup, name)
        if not name.startswith("__") and callable(method) and not isinstance(method, type):
            assert name in known, name
