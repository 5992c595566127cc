"""What runs in the ranks for soak.py: a random program, the same on all ranks but for its delays."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from pathlib import Path
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from comm_core._testing.cases import count_held

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
# Sums of so many ranks are exact in every dtype: 5 * 24 <= 127.
_LARGEST = 24
# In seconds: how far a rank lags behind, rarely and mostly.
_LAGS = ((0.05, 0.2), (0.3, 0.002))


@dataclasses.dataclass
class Round:
    """One rank's report of a round.

    Attributes:
        pid: its process.
        sums: sums of which every bit was right.
        done: how often each other thing was done.
        settled: what the process holds once every group has had a handle, by kind.
        held: the same at the end.
        resident_kib: its own memory at the end, in KiB.
    """

    pid: int = dataclasses.field(default_factory=os.getpid)
    sums: int = 0
    done: dict[str, int] = dataclasses.field(default_factory=dict)
    settled: dict[str, int] = dataclasses.field(default_factory=dict)
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    resident_kib: int = 0


class Program:
    """A random program of one round.

    Args:
        seed: of what all ranks do; each rank's delays have a seed of their own.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a test's data
        self.lag = random.Random(seed * 1000 + dist.get_rank())  # noqa: S311
        self.report = Round()
        size = dist.get_world_size()
        members = [list(range(size)), list(range(size)), sorted(self.random.sample(range(size), max(2, size - 1)))]
        made = [dist.new_group(ranks) for ranks in members]
        # None for a group without this rank.
        self.groups = [
            (ranks, group) if dist.get_rank() in ranks else None for ranks, group in zip(members, made, strict=True)
        ]

    def run(self, seconds: float) -> Round:
        """Run until the time is over on the first rank."""
        for where in self.groups * 2:
            if where is not None:
                self._sum(*where, 1000, torch.float32, in_place=False, step=0)
        comm.close()
        self.report.settled = _held()
        dist.barrier()
        begin = time.monotonic()
        step = 0
        while self._goes_on(time.monotonic() - begin < seconds):
            for _ in range(20):
                step += 1
                self._lag()
                where = self.groups[self.random.randrange(len(self.groups))]
                action = self.random.choices(
                    ("sum", "fused", "close", "suspend", "recover", "check"), (200, 20, 3, 3, 3, 3)
                )[0]
                # Drawn by all ranks, also by those without a part in it.
                numel = int(2 ** self.random.uniform(0, 19))
                dtype, in_place = self.random.choice(DTYPES), self.random.random() < 0.5
                part = self.random.random()
                if where is not None and action == "sum":
                    self._sum(*where, numel, dtype, in_place, step)
                elif where is not None and action == "fused":
                    self._fused(*where, numel, step)
                elif where is not None and action == "recover":
                    self._recover(*where, part)
                elif where is not None:
                    getattr(self, f"_{action}")(*where)
        comm.close()
        self.report.held, self.report.resident_kib = _held(), _resident_kib()
        return self.report

    def _goes_on(self, mine: bool) -> bool:
        """Ask the first rank: the ranks' clocks differ."""
        answer = torch.tensor([int(mine)])
        dist.broadcast(answer, 0)
        return bool(answer.item())

    def _lag(self) -> None:
        for probability, longest_s in _LAGS:
            if self.lag.random() < probability:
                time.sleep(self.lag.uniform(0, longest_s))

    def _count(self, what: str) -> None:
        self.report.done[what] = self.report.done.get(what, 0) + 1

    def _values(self, rank: int, numel: int, dtype: torch.dtype, step: int) -> torch.Tensor:
        return ((torch.arange(numel) * 31 + rank * 17 + step) % (_LARGEST + 1)).to(dtype)

    def _sum(self, ranks: list[int], group: Any, numel: int, dtype: torch.dtype, in_place: bool, step: int) -> None:
        backend = comm.get_backend(group)
        x = self._values(dist.get_rank(), numel, dtype, step)
        y = backend.all_reduce(x, out=x if in_place else None)
        expected = torch.stack([self._values(rank, numel, torch.int64, step) for rank in ranks]).sum(0).to(dtype)
        assert torch.equal(y, expected), (backend.name, ranks, numel, dtype, in_place, step)
        self.report.sums += 1

    def _fused(self, ranks: list[int], group: Any, numel: int, step: int) -> None:
        backend = comm.get_backend(group)
        shape = (1 + numel % 16, 8 << numel % 8)
        x = self._values(dist.get_rank(), shape[0] * shape[1], torch.float32, step).view(shape)
        residual, weight = torch.ones(shape), torch.ones(shape[1])
        with comm.capture():  # on CPUs it records nothing
            y, total = backend.all_reduce_add_rms_norm(x, residual, weight)
        parts = [self._values(rank, x.numel(), torch.float32, step).view(shape) for rank in ranks]
        expected = torch.stack(parts).sum(0) + 1
        assert torch.equal(total, expected), (backend.name, ranks, shape, step)
        assert torch.allclose(y, torch.nn.functional.rms_norm(expected, (shape[1],), weight, 1e-6), rtol=1e-5)
        self._count("fused")

    def _close(self, _ranks: list[int], group: Any) -> None:
        comm.close(group)
        self._count("close")

    def _suspend(self, _ranks: list[int], group: Any) -> None:
        comm.get_backend(group)
        comm.suspend(group)
        self._lag()
        comm.resume(group)
        self._count("suspend")

    def _recover(self, ranks: list[int], group: Any, part: float) -> None:
        """Let the handle of one rank stop, or of none, as after a misuse: no backend is dropped."""
        backend: Any = comm.get_backend(group)
        name = backend.name
        if dist.get_rank() == [*ranks, None][int(part * (len(ranks) + 1))]:
            backend._serving.fail("the soak test stops it")
        comm.recover(group)
        assert backend.name == name, backend.explain()
        self._count("recover")

    def _check(self, _ranks: list[int], group: Any) -> None:
        comm.get_backend(group).check()
        self._count("check")


def _held() -> dict[str, int]:
    held = count_held()
    del held["segments in /dev/shm"]  # they may be another program's
    return held


def _resident_kib() -> int:
    """The memory of this process that no other shares, in KiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def soak(seed: int, seconds: float) -> Round:
    torch.set_num_threads(1)
    return Program(seed).run(seconds)
