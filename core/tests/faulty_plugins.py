"""Backends with one fault each, for tests of how the ranks of a group agree.

Each sums through the harness's side store: no fault of theirs reaches the group's own collectives. A fault happens on
the ranks of the job in `on`. `LOG` holds what happened in this process to each session.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import sys
import threading
import uuid
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from harness import install, side_store
from odd_errors import Noteless, Textless, own_cause

#: The most that a backend here serves, in bytes.
MAX_NBYTES = 256
#: The dtypes that a backend here serves. The admission test tries each, so few keep every negotiation short.
DTYPES = ("float32", "bfloat16", "int64")
#: (backend, session, event) in order; events are "connect", "all_reduce" and "close orderly=…".
LOG: list[tuple[str, str, str]] = []
#: What hanging hooks wait for.
RELEASE = threading.Event()
# Longer than every deadline of the tests, so that only these or `RELEASE` end a wait; in seconds.
_LONG_S = 60


@dataclasses.dataclass
class Session:
    """One group's sums over the side store."""

    id: str
    rank: int
    world_size: int
    store: Any
    memory_nbytes: Any = 0
    calls: int = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        keys = [f"{self.id}/{self.calls}/{rank}" for rank in range(self.world_size)]
        # A copy, since the stride of a single element may be any.
        flat = tensor.new_empty(tensor.numel()).copy_(tensor.reshape(-1))
        self.store.set(keys[self.rank], base64.b64encode(bytes(flat.view(torch.uint8).tolist())).decode())
        self.store.wait(keys, timedelta(seconds=_LONG_S))
        parts = [torch.frombuffer(bytearray(base64.b64decode(self.store.get(key))), dtype=flat.dtype) for key in keys]
        return functools.reduce(torch.add, parts).reshape(tensor.shape)


class Good:
    """Serves up to `MAX_NBYTES`; the others are this one but for their fault."""

    COMM_HOOK_API = (1, 0)

    def __init__(self, name: str, priority: int, *, on: Collection[int] = ()) -> None:
        self.name = name
        self.priority = priority
        self.on = on

    @property
    def faulty(self) -> bool:
        return dist.get_rank() in self.on

    @comm.hookimpl
    def is_available(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        return self.ask(topology)

    @comm.hookimpl
    def connect(self, topology: comm.Topology, context: comm.GroupContext) -> Any:
        assert context.world_size == topology.world_size
        session = self.open(context)
        if session is not None:
            LOG.append((self.name, session.id, "connect"))
        return session

    @comm.hookimpl
    def all_reduce(self, session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        LOG.append((self.name, session.id, "all_reduce"))
        check_contract(tensor, out)
        total = self.sum(session, tensor)
        return total if out is None else out.copy_(total)

    @comm.hookimpl
    def close(self, session: Session, orderly: bool) -> None:
        LOG.append((self.name, session.id, f"close orderly={orderly}"))

    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        assert topology.one_host
        return comm.Available(self.priority, (comm.Range("all_reduce", dtypes=DTYPES, max_nbytes=MAX_NBYTES),))

    def open(self, context: comm.GroupContext) -> Session | None:
        name = context.control.all_gather(uuid.uuid4().hex)[0]
        # A client of its own: a late thread's wait must not block the others.
        return Session(name, context.rank, context.world_size, side_store().clone())

    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        return session.sum(tensor)


def check_contract(tensor: torch.Tensor, out: torch.Tensor | None) -> None:
    """What a hook may rely on."""
    assert 0 < tensor.nbytes <= MAX_NBYTES
    for item in (tensor,) if out is None else (tensor, out):
        assert item.is_contiguous()
        assert not item.data_ptr() % 16
        assert not item.is_neg()
        assert not item.is_complex()
        assert (item.shape, item.dtype, item.device) == (tensor.shape, tensor.dtype, tensor.device)
    if out is not None and out is not tensor:
        assert abs(out.data_ptr() - tensor.data_ptr()) >= tensor.nbytes


class ProbeRaises(Good):
    @comm.hookimpl
    def probe(self) -> dict[str, Any]:
        if self.faulty:
            raise OSError("no compiler")
        return {}


class ProbeIsLong(Good):
    @comm.hookimpl
    def probe(self) -> dict[str, Any]:
        return {"path": "x" * (1000 if self.faulty else 1)}


class SaysNo(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        return comm.Unavailable("its card is unplugged") if self.faulty else super().ask(topology)


class AskRaises(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        if self.faulty:
            raise OSError("the driver went away")
        return super().ask(topology)


class AskExits(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        if self.faulty:
            sys.exit("no licence")
        return super().ask(topology)


class AskRaisesNoteless(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        if self.faulty:
            raise Noteless
        return super().ask(topology)


class AskRaisesALongText(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        if self.faulty:
            raise RuntimeError("the build failed: " + "undefined symbol " * 10_000)
        return super().ask(topology)


class AskReturnsNone(Good):
    def ask(self, topology: comm.Topology) -> comm.Available | comm.Unavailable:
        return None if self.faulty else super().ask(topology)  # type: ignore[return-value]


class _ConnectRaises(Good):
    exchanges: int

    def open(self, context: comm.GroupContext) -> Session | None:
        for number in range(3):
            if self.faulty and number == self.exchanges:
                raise ConnectionError("no route to the peer")
            context.control.all_gather(number)
        return super().open(context)


class ConnectRaisesBefore(_ConnectRaises):
    exchanges = 0


class ConnectRaisesBetween(_ConnectRaises):
    exchanges = 2


class ConnectRaisesAfter(Good):
    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        if self.faulty:
            raise ConnectionError("no route to the peer")
        return session


class ConnectRaisesTextless(Good):
    def open(self, context: comm.GroupContext) -> Session | None:
        if self.faulty:
            raise Textless
        return super().open(context)


class ConnectTimesOutAlone(Good):
    """The others wait for it in `context.group`."""

    def open(self, context: comm.GroupContext) -> Session | None:
        if self.faulty:
            raise TimeoutError("no answer from the licence server")
        assert context.group.size() == context.world_size
        return super().open(context)


class ConnectExits(Good):
    def open(self, context: comm.GroupContext) -> Session | None:
        if self.faulty:
            sys.exit("no licence")
        return super().open(context)


class ConnectReturnsNone(Good):
    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        return None if self.faulty else session


class ConnectExchangesLess(Good):
    """Integers, which might pass for a vote on memory."""

    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        if not self.faulty:
            context.control.all_gather(7)
        return session


class ConnectBarsInsteadOfGathering(Good):
    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        if self.faulty:
            context.control.barrier()
        else:
            context.control.all_gather(7)
        return session


class ConnectIgnoresErrors(Good):
    """One rank fails; the others catch the error and go on to a session."""

    def open(self, context: comm.GroupContext) -> Session | None:
        if self.faulty:
            raise ConnectionError("no route to the peer")
        for _ in range(3):
            try:
                context.control.barrier()
            except comm.CommError:
                continue
            raise AssertionError("an aborted stage went on")
        return Session(uuid.uuid4().hex, context.rank, context.world_size, side_store())


class ConnectTakesTooMuch(Good):
    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        assert session is not None
        session.memory_nbytes = context.memory_budget_nbytes + self.faulty
        return session


class ConnectCountsBadly(Good):
    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        assert session is not None
        session.memory_nbytes = "plenty" if self.faulty else 0
        return session


class ConnectHangs(Good):
    """The others are ready to vote."""

    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        if self.faulty:
            RELEASE.wait(_LONG_S)
        return session


class ConnectHangsInExchange(Good):
    """The others wait in an exchange; the late one ignores that it is over."""

    def open(self, context: comm.GroupContext) -> Session | None:
        session = super().open(context)
        if self.faulty:
            RELEASE.wait(_LONG_S)
            with contextlib.suppress(comm.CommError):
                context.control.barrier()
        else:
            context.control.barrier()
        return session


class ConnectRaisesAndPeersHang(Good):
    """One rank fails at once, the others wait for it by means of their own."""

    def open(self, context: comm.GroupContext) -> Session | None:
        if self.faulty:
            raise ConnectionError("no route to the peer")
        RELEASE.wait(_LONG_S)
        return Session(uuid.uuid4().hex, context.rank, context.world_size, side_store())


class SumsWrong(Good):
    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        total = super().sum(session, tensor)
        return total + 1 if self.faulty else total


class SumsBf16Wrong(Good):
    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        total = super().sum(session, tensor)
        return total + 1 if self.faulty and tensor.dtype is torch.bfloat16 else total


class SumRaises(Good):
    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        total = super().sum(session, tensor)
        if self.faulty:
            raise ArithmeticError("an illegal access")
        return total


class SumRaisesItsOwnCause(Good):
    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        total = super().sum(session, tensor)
        if self.faulty:
            raise own_cause()
        return total


class SumExits(Good):
    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        session.calls += 1
        if self.faulty:
            sys.exit("out of licences")
        return tensor.clone()  # without it: it says nothing more


class SumHangs(Good):
    def sum(self, session: Session, tensor: torch.Tensor) -> torch.Tensor:
        if self.faulty:
            RELEASE.wait(_LONG_S)
        return super().sum(session, tensor)


class CloseRaises(Good):
    @comm.hookimpl
    def close(self, session: Session, orderly: bool) -> None:
        super().close(session, orderly)
        if self.faulty:
            raise OSError("already gone")


def source(kind: type[Good], name: str, priority: int, *, on: Collection[int] = ()) -> str:
    """A plugin's module with one of the classes above, or of another test's module."""
    arguments = f"{name!r}, {priority}, on={tuple(on)!r}"
    return f"import {kind.__module__} as kinds\n\nplugin = kinds.{kind.__name__}({arguments})\n"


def install_kind(folder: Path, kind: type[Good], name: str, priority: int, *, on: Collection[int] = ()) -> Path:
    """Install one of the classes above as the backend `name`; see `harness.install`."""
    return install(folder, name, source(kind, name, priority, on=on))
