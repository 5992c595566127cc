"""Graph inputs that peers read where they are: a table of addresses, filled when a capture ends.

Inside `capture_ctx` a backend records a call with a row of a table in device memory, and its kernel reads every rank's
address from that row. The capture's clean exit settles which:

1. The ranks gather how many calls they recorded, and why theirs can't be shared, if so: every rank raises the same.
2. They gather, for each call, the allocation and the offset in it, and for allocations that the others don't have yet a
   handle; in parts, since a message is bounded. Descriptors of open files go over a socket (`_mailbox`).
3. Each opens what it hasn't opened before, and they vote. Then each writes its rows.

No reference to a tensor is kept, so a graph's pool may use the memory again, and several calls may share an address.
What was opened stays open until `close`, or until its owner has another allocation at that place, which CUDA may refuse
to open beside it: graphs that read the former one are dead by then. Each row carries its call's tag, and no two calls
have the same: a graph whose capture didn't end well finds another tag in its row, or none (`registered.cuh`).

The native part is `comm_core/peer_memory.h`, bound by `comm_core/peer_memory_functions.h`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from comm_core._deadline import describe
from comm_core._inputs import Inputs, Span, gather_parts, handle_of
from comm_core._mailbox import Mailbox
from comm_core.context import GroupContext
from comm_core.errors import CaptureError
from comm_core.topology import Topology
from comm_core.types import rank_label

__all__ = ["ROWS", "PeerMemory", "Registry", "unshareable"]

#: Rows of a table by default: some thousand calls a model, for each of some ten batch sizes, and twice that.
ROWS = 1 << 15
# `kRowMask` in registered.cuh: a tag's lower bits are its row.
_INDEX_BITS = 20
# `Sharing` in peer_memory.h: CUDA IPC opens an allocation as a whole.
_IPC, _FILE = 0, 1
_REASON_CHARS = 2_000
# How long the ranks may take to hand each other their files, in seconds.
_FILES_S = 60.0
# torch's allocators whose memory can be shared with other processes.
_SHAREABLE = ("native", "expandable_segments")


@dataclasses.dataclass(frozen=True)
class PeerMemory:
    """What `peer_memory_functions.h` exports, in its order: `PeerMemory(*module.peer_memory(device_index))`.

    Attributes:
        locate: (address, nbytes) -> how it is shared, the offset in its first piece, then base, bytes and key of each.
        share: (base, sharing) -> a piece's handle: bytes, or the descriptor of a file.
        open: (handle) -> the address here of a peer's allocation.
        import_piece: (sharing, file, handle) -> the number here of a peer's piece.
        map: (numbers, nbytes) -> the address here of pieces side by side.
        let_go: (address) lets go of what `open` gave.
        close: lets go of what is left.
    """

    locate: Callable[[int, int], Sequence[Any]]
    share: Callable[[int, int], Any]
    open: Callable[[bytes], int]
    import_piece: Callable[[int, int, bytes], int]
    map: Callable[[Sequence[int], Sequence[int]], int]
    let_go: Callable[[int], None]
    close: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class _Window:
    """Where a peer's span is mapped here.

    Attributes:
        address: here.
        allocation: base and end where its owner has it, and its key, if it was opened by CUDA IPC.
    """

    address: int
    allocation: tuple[int, int, str] | None


def unshareable(topology: Topology) -> str:
    """Why the ranks' tensors can't be read where they are, as far as it is known before; "" where they may be. Pure."""
    if not topology.one_host:
        return "the ranks are on several hosts, or in containers apart"
    allocators = {rank: info.allocator for rank, info in enumerate(topology.ranks)}
    if len(set(allocators.values())) > 1:
        return f"the ranks' allocators differ: {allocators}"
    return "" if allocators[0] in _SHAREABLE else f"memory of the allocator {allocators[0]!r} can't be shared"


class Registry:
    """The table of one session, and what its peers' inputs are mapped to.

    Attributes:
        refused: why calls aren't recorded with rows any more; "" while they are. Equal on every rank.
    """

    def __init__(self, context: GroupContext, memory: PeerMemory, rows: int = ROWS) -> None:
        """Allocates the table, on `context.device`."""
        self.refused = ""
        self._context = context
        self._memory = memory
        size = (rows, 1 + context.world_size)
        self._table: torch.Tensor | None = torch.zeros(size, dtype=torch.int64, device=context.device)
        self._rows = rows
        self._used = 0  # rows of captures that ended well
        self._serial = 0
        self._tags: list[int] = []  # of this capture's calls
        self._inputs: list[tuple[int, int]] = []  # and what each reads: address, bytes
        self._shared: set[str] = set()  # own pieces that every peer has
        self._imported: dict[tuple[int, str], int] = {}  # number of a peer's piece, by rank and key
        self._windows: dict[tuple[int, tuple[str, ...]], _Window] = {}  # by the peer's job rank and keys
        _registries.setdefault(self._job_rank(context.rank), weakref.WeakSet()).add(self)

    @property
    def used(self) -> int:
        """Rows of captures that ended well."""
        return self._used

    @property
    def table(self) -> torch.Tensor:
        """int64, `[rows, 1 + world_size]`: tag, then every rank's address.

        Raises:
            ValueError: it was given back.
        """
        if self._table is None:
            raise ValueError("the registry is closed")
        return self._table

    def problem(self) -> str:
        """Why memory from torch's allocator, such as the table's, can't be shared; "" where it can. Local."""
        try:
            self._locate(self.table.data_ptr(), self.table.nbytes)
        except RuntimeError as error:
            return describe(error)
        return ""

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Record no call with a row from now on, for these reasons by rank; the same on every rank."""
        self.refused = self.refused or self._words(reasons)

    def take(self, address: int, nbytes: int) -> int:
        """A row for a call that is recorded now and reads `nbytes` bytes at `address`.

        Returns:
            The row's tag, whose lower 20 bits are its index; 0 where there is none, alike on all ranks: the table is
            full, or rows are refused.
        """
        index = self._used + len(self._tags)
        if self.refused or index >= self._rows:
            return 0
        self._serial += 1
        self._tags.append(self._serial << _INDEX_BITS | index)
        self._inputs.append((address, nbytes))
        return self._tags[-1]

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Calls are recorded in it. Leaving is Collective if some were; by an exception Local, and they are forgotten.

        Raises:
            CaptureError: on all ranks: an input can't be shared or opened, or the ranks recorded different calls.
            CommError: a peer failed, or didn't come.
        """
        try:
            yield
            if self._tags:
                self._register()
        finally:
            # Also the rows: every rank's capture failed, and they count alike again.
            self._tags, self._inputs = [], []

    def close(self) -> None:
        """Let go of the peers' memory and the table. Nothing on the device may use them any more. Idempotent."""
        if self._table is not None:
            self._memory.close()
            self._table = None
            self._windows.clear()
            self._imported.clear()

    def _register(self) -> None:
        control, count = self._context.control, len(self._tags)
        mine, problem = Inputs(), ""
        try:
            mine = self._described()
        except RuntimeError as error:
            problem = describe(error)[:_REASON_CHARS]
        parts = mine.parts()
        sizes = hashlib.sha256(repr([nbytes for _, nbytes in self._inputs]).encode()).hexdigest()[:16]
        said = control.all_gather(
            {"used": self._used, "calls": count, "sizes": sizes, "problem": problem, "parts": len(parts)}
        )
        self._judge(said)
        theirs = gather_parts(control, parts, [item["parts"] for item in said])
        reason = self._fetch_files(theirs, mine)
        addresses: list[list[int]] = []
        try:
            addresses = [] if reason else self._opened(theirs)
        except RuntimeError as error:
            reason = describe(error)
        vote = control.agree(not reason, reason[:_REASON_CHARS])
        if not vote.ok:
            self._fail(vote.reasons)
        self._shared.update(mine.handles)
        # On the host first, and synchronised: no replay begins before every rank's are there, since core votes next.
        rows = torch.tensor(list(zip(self._tags, *addresses, strict=True)), dtype=torch.int64, device="cpu")
        self.table[self._used : self._used + count].copy_(rows)
        self._used += count

    def _judge(self, said: list[dict[str, Any]]) -> None:
        """Raise on every rank what one of them can't do, or where they differ."""
        problems = {rank: item["problem"] for rank, item in enumerate(said) if item["problem"]}
        if problems:
            self._fail(problems)
        for what in ("used", "calls", "sizes"):
            counts = {rank: item[what] for rank, item in enumerate(said)}
            if len(set(counts.values())) == 1:
                continue
            if what == "used":  # an exit failed on some ranks alone, and the tables don't agree any more
                self._fail({0: f"the ranks' tables have different numbers of rows: {counts}"})
            numbers = f"numbers of calls: {counts}" if what == "calls" else "sizes of calls"
            raise CaptureError(
                f"the ranks recorded different {numbers} in this capture. Its graphs must not be replayed; every rank "
                "has to make the same calls"
            )

    def _fail(self, reasons: Mapping[int, str]) -> None:
        self.refuse(reasons)
        raise CaptureError(
            f"inputs of captured calls can't be read by the other ranks: {self._words(reasons)}. This capture's graphs "
            "must not be replayed; capture again: from now on this group's graphs copy their inputs"
        )

    def _words(self, reasons: Mapping[int, str]) -> str:
        names = self._context.global_ranks
        return "; ".join(f"rank {rank_label(rank, names[rank])}: {reason}" for rank, reason in reasons.items())

    def _locate(self, address: int, nbytes: int) -> tuple[Span, int]:
        sharing, offset, *rest = self._memory.locate(address, nbytes)
        pieces = zip(map(int, rest[::3]), map(int, rest[1::3]), map(str, rest[2::3]), strict=True)
        return Span(int(sharing), tuple(pieces)), int(offset)

    def _described(self) -> Inputs:
        """What this rank's calls read, as peers need to know it."""
        inputs, located = Inputs(), functools.cache(self._locate)
        for address, nbytes in self._inputs:
            span, offset = located(address, nbytes)
            inputs.rows.append((inputs.spans.setdefault(span, len(inputs.spans)), offset))
        for span in inputs.spans:
            for base, _, key in span.pieces:
                if key not in self._shared and key not in inputs.handles:
                    file = span.sharing == _FILE
                    inputs.handles[key] = None if file else bytes(self._memory.share(base, span.sharing)).hex()
        return inputs

    def _fetch_files(self, theirs: list[Any], mine: Inputs) -> str:
        """Import what comes as open files; why that failed, or "". Collective where some rank has such."""
        expected = [
            (rank, key)
            for rank, (_, _, handles) in enumerate(theirs)
            for key, handle in handles.items()
            if handle is None
        ]
        if not expected:
            return ""
        context = self._context
        with contextlib.ExitStack() as stack:
            path, wrong = "", ""
            try:
                box = stack.enter_context(contextlib.closing(Mailbox()))
                path = box.path
            except OSError as error:
                wrong = f"no socket for the peers' files: {describe(error)}"
            paths = context.control.all_gather(path)
            if not all(paths):
                return wrong or f"rank {paths.index('')} has no socket for files"
            bases = {key: base for span in mine.spans for base, _, key in span.pieces}
            outgoing = {
                key: functools.partial(self._memory.share, bases[key], _FILE)
                for key, handle in mine.handles.items()
                if handle is None
            }
            errors: list[str] = []
            take = functools.partial(self._take_file, errors)
            others = [other for rank, other in enumerate(paths) if rank != context.rank]
            from_others = [item for item in expected if item[0] != context.rank]
            try:
                box.swap(context.rank, others, outgoing, from_others, take, _FILES_S)
            except (RuntimeError, OSError) as error:
                errors.append(describe(error))
            return errors[0] if errors else ""

    def _take_file(self, errors: list[str], rank: int, key: str, file: int) -> None:
        # What goes wrong is told in the vote: the peers go on sending, and so does this rank.
        try:
            if (rank, key) not in self._imported:
                self._imported[rank, key] = self._memory.import_piece(_FILE, file, b"")
        except RuntimeError as error:
            errors.append(describe(error))
        finally:
            os.close(file)

    def _opened(self, theirs: list[Any]) -> list[list[int]]:
        """For each rank the addresses here of what its calls read; what isn't mapped yet is."""
        addresses = []
        for rank, (spans, rows, handles) in enumerate(theirs):
            if rank == self._context.rank:
                addresses.append([address for address, _ in self._inputs])
                continue
            windows = [self._window(rank, sharing, pieces, handles).address for sharing, pieces in spans]
            addresses.append([windows[number] + offset for number, offset in rows])
        return addresses

    def _window(
        self, rank: int, sharing: int, pieces: list[tuple[int, int, str]], handles: dict[str, str | None]
    ) -> _Window:
        """Where a peer's span is here."""
        peer, keys = self._job_rank(rank), tuple(key for _, _, key in pieces)
        if (peer, keys) in self._windows:
            return self._windows[peer, keys]
        if sharing == _IPC:
            ((base, nbytes, key),) = pieces
            allocation = (base, base + nbytes, key)
            for registry in _registries[self._job_rank(self._context.rank)]:
                registry._let_go(peer, allocation)  # noqa: SLF001 - another session's of this process
            window = _Window(int(self._memory.open(handle_of(handles, key))), allocation)
        else:
            for key in keys:
                if (rank, key) not in self._imported:
                    self._imported[rank, key] = self._memory.import_piece(sharing, -1, handle_of(handles, key))
            numbers = [self._imported[rank, key] for key in keys]
            window = _Window(int(self._memory.map(numbers, [nbytes for _, nbytes, _ in pieces])), None)
        self._windows[peer, keys] = window
        return window

    def _let_go(self, peer: int, allocation: tuple[int, int, str]) -> None:
        """Close what is still open of allocations whose place a peer's `allocation` has by now."""
        base, end, key = allocation
        for name, window in list(self._windows.items()):
            if name[0] == peer and window.allocation is not None:
                its_base, its_end, its_key = window.allocation
                if its_base < end and base < its_end and its_key != key:
                    del self._windows[name]
                    self._memory.let_go(window.address)

    def _job_rank(self, rank: int) -> int:
        return self._context.global_ranks[rank]


# Of this process, by its rank in the job: an allocation may be open in several sessions.
_registries: dict[int, weakref.WeakSet[Registry]] = {}
