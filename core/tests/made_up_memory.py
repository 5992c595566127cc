"""What the tests of registration share: ranks that are threads, each with memory of its own that nobody else sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core.channel import SessionChannel
from comm_core.registration import PeerMemory, Registry
from control_ranks import group_of, outcome, start

T = TypeVar("T")
IPC, FILE, FABRIC = 0, 1, 2


class Space:
    """The memory of a rank: allocations of its own, and what of its peers' it has opened."""

    def __init__(self, ranks: list[Space]) -> None:
        self.ranks = ranks
        self.pieces: dict[int, tuple[int, int, str]] = {}  # by base: bytes, sharing, key
        self.files: dict[str, int] = {}
        self.views: dict[int, list[tuple[int, int, int]]] = {}  # by address: rank, base, bytes
        self.imported: list[tuple[int, int]] = []  # rank, base
        self.broken: dict[str, str] = {}
        self.log: list[str] = []
        self.closed = 0
        self.opened: dict[int, tuple[tuple[int, int, int], str]] = {}  # by address: rank, base, bytes; key
        self.allocated = 0

    def allocate(self, base: int, nbytes: int, sharing: int = IPC) -> int:
        for other in [
            other for other, (size, _, _) in self.pieces.items() if other < base + nbytes and base < other + size
        ]:
            del self.pieces[other]  # it was freed
        self.allocated += 1
        key = f"{base}.{self.allocated}"
        self.pieces[base] = (nbytes, sharing, key)
        if sharing == FILE:
            self.files[key] = os.memfd_create(key)
        return base

    def memory(self) -> PeerMemory:
        return PeerMemory(self.locate, self.share, self.open, self.import_piece, self.map, self.let_go, self.close)

    def locate(self, address: int, nbytes: int) -> list[Any]:
        self._note("locate")
        found: list[Any] = []
        at = address
        while at < address + nbytes:
            base = max((base for base in self.pieces if base <= at), default=None)
            if base is None or at >= base + self.pieces[base][0]:
                raise RuntimeError(f"no allocation at {at}")
            size, sharing, key = self.pieces[base]
            found += [base, size, key] if found else [sharing, address - base, base, size, key]
            at = base + size
        return found

    def share(self, base: int, sharing: int) -> bytes | int:
        self._note("share")
        _, kind, key = self.pieces[base]
        assert kind == sharing
        return os.dup(self.files[key]) if sharing == FILE else key.encode().ljust(64, b"\0")

    def open(self, handle: bytes) -> int:
        self._note("open")
        key = handle.rstrip(b"\0").decode()
        rank, base = self._by_key(key)
        nbytes = self.ranks[rank].pieces[base][0]
        for (other, at, its_nbytes), its_key in self.opened.values():
            if other == rank and at < base + nbytes and base < at + its_nbytes and its_key != key:
                raise RuntimeError("resource already mapped")
        address = self._view([(rank, base, nbytes)])
        self.opened[address] = ((rank, base, nbytes), key)
        return address

    def let_go(self, address: int) -> None:
        del self.opened[address]

    def import_piece(self, sharing: int, file: int, handle: bytes) -> int:
        self._note("import_piece")
        if sharing == FABRIC:
            self.imported.append(self._by_key(handle.rstrip(b"\0").decode()))
        else:
            inode = os.fstat(file).st_ino
            self.imported += [
                (rank, base)
                for rank, space in enumerate(self.ranks)
                for base, (_, _, key) in space.pieces.items()
                if key in space.files and os.fstat(space.files[key]).st_ino == inode
            ]
        return len(self.imported) - 1

    def map(self, numbers: Any, nbytes: Any) -> int:
        self._note("map")
        return self._view([(*self.imported[number], size) for number, size in zip(numbers, nbytes, strict=True)])

    def close(self) -> None:
        self.closed += 1

    def seen(self, address: int) -> tuple[int, int]:
        """Whose memory is at an address here, and where he has it."""
        start = max(start for start in self.views if start <= address)
        offset = address - start
        for rank, base, nbytes in self.views[start]:
            if offset < nbytes:
                return rank, base + offset
            offset -= nbytes
        raise AssertionError(f"nothing is mapped at {address}")

    def _by_key(self, key: str) -> tuple[int, int]:
        (found,) = (
            (rank, base)
            for rank, space in enumerate(self.ranks)
            for base, piece in space.pieces.items()
            if piece[2] == key
        )
        return found

    def _view(self, pieces: list[tuple[int, int, int]]) -> int:
        address = (1 << 40) * (1 + len(self.views))
        self.views[address] = pieces
        return address

    def _note(self, what: str) -> None:
        self.log.append(what)
        if what in self.broken:
            raise RuntimeError(self.broken[what])


class Group:
    """Ranks with a registry each. `Group.run` calls something on each of them at once, in one stage of control."""

    def __init__(self, world_size: int, rows: int = 64) -> None:
        self.spaces: list[Space] = []
        self.spaces += [Space(self.spaces) for _ in range(world_size)]
        self.members = group_of(dist.HashStore(), world_size, global_ranks=tuple(range(10, 10 + world_size)))
        self.channels = [SessionChannel() for _ in range(world_size)]
        self.registries = [Registry(self.context(rank), self.spaces[rank].memory(), rows) for rank in range(world_size)]
        self.captures = 0

    def context(self, rank: int) -> comm.GroupContext:
        group: Any = object()
        names = self.members[rank].global_ranks
        world_size, device = len(self.members), torch.device("cpu")
        return comm.GroupContext(group, rank, world_size, device, names, self.channels[rank], 1 << 30, 60.0)

    def run(self, work: Callable[[int, Registry], T]) -> list[T | BaseException]:
        self.captures += 1
        name = f"capture {self.captures}"

        def on(rank: int) -> T:
            with self.channels[rank].opened(self.members[rank], name):
                return work(rank, self.registries[rank])

        return [outcome(future) for future in [start(lambda rank=rank: on(rank)) for rank in range(len(self.members))]]

    def capture(self, inputs: Callable[[int], list[tuple[int, int]]]) -> list[list[int] | BaseException]:
        """One capture of calls that read what `inputs` says for a rank; each rank's tags."""

        def work(rank: int, registry: Registry) -> list[int]:
            with registry.capture():
                return [registry.take(*item) for item in inputs(rank)]

        return self.run(work)

    def check(self, rank: int, tag: int, addresses: list[int]) -> None:
        """That a rank's row is the call's, and leads to what each rank reads."""
        row = self.registries[rank].table[tag & 0xFFFFF].tolist()
        assert row[0] == tag
        for peer, address in enumerate(addresses):
            found = (peer, row[1 + peer]) if peer == rank else self.spaces[rank].seen(row[1 + peer])
            assert found == (peer, address)
