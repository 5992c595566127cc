"""Backends that sum through `context.group`, and what the ranks of test_own_group.py do; runs in their processes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core._control.own_group import OwnGroup
from comm_core._control.store import Control, store_of
from harness import side_store
from torch.distributed import distributed_c10d

#: The groups that `Summing` was given in this process.
GROUPS: list[Any] = []
#: A hook that hangs waits for it.
RELEASE = threading.Event()


class Summing:
    """Sums in two halves by the group's collectives; its fault happens in one call on the ranks of the job in `on`.

    Args:
        when: "before", "between" or "after" the halves.
        call: the number of the call with the fault, from 1.
        on: the faulty ranks.
    """

    COMM_HOOK_API = (1, 0)

    def __init__(self, when: str = "", call: int = 0, on: Collection[int] = ()) -> None:
        self.when = when
        self.call = call
        self.on = on
        self.calls = 0

    def fault(self, when: str) -> None:
        if (when, self.calls) == (self.when, self.call) and dist.get_rank() in self.on:
            raise MemoryError("no room for a buffer")

    @comm.hookimpl
    def all_reduce(self, session: Any, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        self.fault("before")
        group = session.group
        GROUPS[:] = [group]
        total = tensor.clone() if out is None else out if out is tensor else out.copy_(tensor)
        flat = total.reshape(-1)
        half = flat.numel() // 2
        dist.all_reduce(flat[half:], group=group)
        self.fault("between")
        if half:
            dist.all_reduce(flat[:half], group=group)
        self.fault("after")
        return total


class ConnectFails(Summing):
    """Uses the group in `connect`, and then fails on the ranks in `on`, while the others use it once more."""

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> Any:  # noqa: ARG002
        dist.all_reduce(torch.ones(1000), group=context.group)
        if dist.get_rank() in self.on:
            raise OSError("the cable is loose")
        dist.all_reduce(torch.ones(1000), group=context.group)
        return context


class AsksAlone(Summing):
    """On the ranks in `on` it doesn't ask for the group in `connect`, and returns."""

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> Any:  # noqa: ARG002
        if dist.get_rank() not in self.on:
            context.group.rank()
        return context


class FailsWithoutAsking(Summing):
    """Fails in `connect` on the ranks in `on` before it asks for the group, for which the others wait."""

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> Any:  # noqa: ARG002
        if dist.get_rank() in self.on:
            raise OSError("the cable is loose")
        context.group.rank()
        return context


class ConnectIsLate(Summing):
    """Its `connect` makes the group, and returns after the deadline on the ranks in `on`."""

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> Any:  # noqa: ARG002
        GROUPS[:] = [context.group]
        if dist.get_rank() in self.on:
            RELEASE.wait(60)
        return context


class PreparationFails(Summing):
    """Its `pre_capture_init` sums; on the ranks in `on` it raises first."""

    @comm.hookimpl
    def is_available(self, topology: comm.Topology) -> comm.Available:  # noqa: ARG002
        return comm.Available(500, (comm.Range("all_reduce", max_nbytes=4096, prepared=True),))

    @comm.hookimpl
    def pre_capture_init(self, session: Any, shapes: comm.Shapes) -> Any:  # noqa: ARG002
        if dist.get_rank() in self.on:
            raise OSError("the cable is loose")
        dist.all_reduce(torch.ones(1000), group=session.group)
        return (comm.Range("all_reduce", max_nbytes=4096),)


def members_group(members: Collection[int]) -> Any:
    return dist.group.WORLD if len(members) == dist.get_world_size() else dist.new_group(list(members))


def verdict(backend: comm.Backend, name: str = "acme") -> tuple[str, str, int | None]:
    found = next(item for item in backend.decision.candidates if item.name == name)
    return found.verdict, found.reason, found.rank


def wrong_sums(backend: comm.Backend, group: Any) -> list[Any]:
    """Sums of scalars and of more, by the handle and by the caller's own calls on the group, that are wrong."""
    size, wrong = dist.get_world_size(group), []
    for turn in range(4):
        for numel in (1, 1000):
            tensor = torch.full((numel,), 10.0 * turn + dist.get_rank(group))
            expected = torch.full((numel,), 10.0 * turn * size + size * (size - 1) // 2)
            own = tensor.clone()
            dist.all_reduce(own, group=group)
            wrong += [found for found in (backend.all_reduce(tensor), own) if not torch.equal(found, expected)]
    return wrong


def fall_back(members: tuple[int, ...]) -> Any:
    """What becomes of a backend and of the sums after it."""
    group = members_group(members)
    if not isinstance(group, dist.ProcessGroup):
        return None
    backend = comm.get_backend(group)
    found = verdict(backend), wrong_sums(backend, group)
    comm.close(group)
    return found


def be_prepared() -> Any:
    backend = comm.get_backend()
    before = wrong_sums(backend, dist.group.WORLD)
    with contextlib.suppress(comm.CommError):
        comm.pre_capture_init(max_tokens=4, hidden_size=8, dtype=torch.float32)
    return before, verdict(backend), wrong_sums(backend, dist.group.WORLD)


def be_late() -> Any:
    """What becomes of a group whose `connect` outlives its deadline on one rank."""
    before = traces()
    RELEASE.clear()
    backend = comm.get_backend()
    found = verdict(backend), wrong_sums(backend, dist.group.WORLD)
    RELEASE.set()
    for thread in threading.enumerate():
        if thread.name.startswith("comm-core"):
            thread.join(20)
    GROUPS.clear()
    comm.close()
    return found, differences(before)


def traces() -> dict[str, int]:
    """Count what a process group leaves behind: torch's records, threads, sockets and other open files."""
    found = {
        name: len(value)
        for name, value in vars(distributed_c10d).items()
        if isinstance(value, dict) and not name.startswith("__")
    }
    found["threads"] = len(list(Path("/proc/self/task").iterdir()))
    found["files"] = len(list(Path("/proc/self/fd").iterdir()))
    return found


def differences(before: dict[str, int]) -> dict[str, int]:
    """What there is more of than before, on this rank, once every rank has closed its groups."""
    dist.barrier()
    after = traces()
    return {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}


def live_often() -> Any:
    """Serve and close groups by the candidate's own one, eight times; count what is left."""
    verdicts, wrong = set(), []

    def live() -> None:
        backend = comm.get_backend()
        verdicts.add(verdict(backend)[0])
        wrong.extend(wrong_sums(backend, dist.group.WORLD))
        comm.close()
        GROUPS.clear()

    live()  # what torch makes once
    before = traces()
    for _ in range(8):
        live()
    return verdicts, wrong, differences(before)


def resolve() -> Any:
    """What torch's public functions say of the own group of a sub-group, and of later groups."""
    parent = dist.new_group([2, 0])
    if dist.get_rank() == 1:
        found: Any = None
    else:
        backend = comm.get_backend(parent)
        (own,) = GROUPS
        value = torch.tensor([dist.get_rank(own)])
        dist.broadcast(value, group_src=1, group=own)
        config = distributed_c10d._world.pg_config_info
        found = (
            verdict(backend)[0],
            own is not parent,
            dist.get_rank(own) == dist.get_rank(parent),
            dist.get_process_group_ranks(own) == dist.get_process_group_ranks(parent),
            dist.get_backend(own) == dist.get_backend(parent),
            dist.get_backend_config(own) == dist.get_backend_config(parent),
            own.group_name in {item["pg_name"] for item in config},
            distributed_c10d._resolve_process_group(own.group_name) is own,
            value.item(),
        )
    # Later groups are named as without own groups: by all ranks, and by the members alone.
    plain = dist.new_group([0, 1])
    pair = [1, 2]
    local = dist.new_group(pair, use_local_synchronization=True) if dist.get_rank() in pair else None
    for group in (plain, local):
        if isinstance(group, dist.ProcessGroup):
            dist.all_reduce(torch.ones(1), group=group)
    if dist.get_rank() != 1:
        comm.close(parent)
    return found


def own_group(name: str, timeout_s: float = 60.0) -> OwnGroup:
    group = dist.group.WORLD
    control = Control(store_of(group), dist.get_rank(), tuple(range(dist.get_world_size())), timeout_s)
    control.join(set())
    return OwnGroup(group, control, name, timeout_s)


def ask_in_threads() -> Any:
    """Whether ten threads of a rank get one group, which then sums; and what they get after its end."""
    own, groups = own_group("group of acme"), []
    threads = [threading.Thread(target=lambda: groups.append(own.get()), daemon=True) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    total = torch.ones(1)
    dist.all_reduce(total, group=groups[0])
    dist.barrier()
    own.close(tell_peers=False)
    own.close(tell_peers=False)
    error = ""
    try:
        own.get()
    except comm.CommError as raised:
        error = str(raised)
    return len(groups), len(set(map(id, groups))), total.item(), error


def close_while_threads_wait() -> Any:
    """What a thread raises that waits in a call of the group when this rank closes it; no other rank calls."""
    own, raised = own_group("group of acme"), []
    group = own.get()
    if dist.get_rank() == 0:

        def wait() -> None:
            try:
                dist.all_reduce(torch.ones(1000), group=group)
            except Exception as error:  # noqa: BLE001 - which one depends on how far torch was
                raised.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(0.5)
        own.close(tell_peers=False)
        thread.join(30)
        side_store().set("closed", "")
    side_store().wait(["closed"])
    own.close(tell_peers=False)
    return len(raised)
