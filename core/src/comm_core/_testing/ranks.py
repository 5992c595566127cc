"""Run functions of a test in real processes: the ranks of a torch.distributed job over Gloo on this host.

    def total(x):                       # at the top level of a test's module; runs on every rank
        tensor = torch.tensor([x + dist.get_rank()])
        dist.all_reduce(tensor)
        return tensor.item()

    def test_total(ranks):              # a fixture with a `Ranks`
        assert ranks.run(total, 5, world_size=2) == [11, 11]

The processes stay for the whole test session, because importing torch takes seconds. Each run is a separate job with a
new store. A process that a test has killed is replaced before the next run. A failed run ends all processes, unless the
pool is a lasting one, as does a run on GPUs in which a process was killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from comm_core._plugins import discovery
from comm_core._testing.rank_process import END_S, Job

__all__ = ["DEAD", "RankError", "Ranks", "install"]

_dist: Any = dist  # torch lists some of its public names only at run time
#: What `Ranks.run` returns for a rank that was expected to die and did.
DEAD = "dead"
# Seconds that the ranks get to report after their deadline, or after one of them failed.
_GRACE_S = 15.0
_STDERR_CHARS = 4000
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; from comm_core._testing import rank_process; "
    "rank_process.work(sys.argv[1])"
)


class RankError(AssertionError):
    """A rank raised, died or didn't return in time; the text has each rank's traceback and the end of its stderr."""


class _Process:
    """A process that runs ranks, and the parent's end of the pipe to it."""

    def __init__(self, folder: Path, number: int, env: Mapping[str, str]) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("COMM_CORE_")}
        # One thread per process, because the processes share the host's cores.
        environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **env}
        self.stderr = folder / f"process{number}.stderr"
        self.offset = 0
        self.pipe, theirs = multiprocessing.Pipe()
        with self.stderr.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=environ,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that `kill` ends its children too
            )
        theirs.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.pipe.close()

    def read_stderr(self) -> str:
        """Return the process's output to stderr since the last call."""
        with self.stderr.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        self.offset += len(text)
        return text.decode(errors="replace")


class Ranks:
    """A pool of processes for the ranks of jobs.

    Args:
        folder: the folder for the processes' stdout and stderr.
        env: variables that the processes start with, by rank; for those that CUDA or torch reads once per process.
        lasting: whether the processes stay after a run on CPUs in which a rank has raised, and none hung or died.
        grace_s: how long the other ranks get to report after one rank failed, in seconds.
    """

    def __init__(
        self,
        folder: Path,
        env: Sequence[Mapping[str, str]] = (),
        *,
        lasting: bool = False,
        grace_s: float = _GRACE_S,
    ) -> None:
        self._folder = folder
        self._lasting = lasting
        self._grace_s = grace_s
        self._env = env
        self._processes: dict[int, _Process] = {}
        self._started = 0

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        world_size: int = 2,
        backend: str = "gloo",
        env: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        path: Sequence[Sequence[Path]] = (),
        installed: bool = False,
        deadline_s: float = 120.0,
        dying: Collection[int] = (),
        devices: Sequence[int] | None = None,
    ) -> list[Any]:
        """Call `function(*arguments)` on every rank of a new job, with the default process group initialised.

        Args:
            function: a function at the top level of its module.
            arguments: values that pickle accepts.
            world_size: the number of ranks.
            backend: the default process group's backend; if it names CUDA, each rank uses one GPU, see `devices`.
            env: environment variables for the call: one mapping for all ranks, or one mapping per rank.
            path: folders in front of `sys.path` for the call, one sequence per rank; see `install`.
            installed: whether the ranks see also the backends that are installed on this machine.
            deadline_s: the whole run's deadline, in seconds.
            dying: the ranks that the test kills by a signal.
            devices: each rank's GPU, by the index that it has in that process; None: the rank. If an index comes twice,
                NCCL connects the default group only when it's used, which fails if the ranks share a GPU.

        Returns:
            Each rank's return value, by rank; `DEAD` for the ranks in `dying`.

        Raises:
            RankError: a rank raised, died unexpectedly, didn't return in time or, on a GPU, didn't destroy its process
                groups in time.
        """
        envs = [env or {}] * world_size if env is None or isinstance(env, Mapping) else list(env)
        paths = [tuple(map(str, folders)) for folders in path] or [()] * world_size
        if {len(envs), len(paths)} != {world_size}:
            raise ValueError(f"{len(envs)} environments and {len(paths)} paths for {world_size} ranks")
        on_gpus = "cuda" in backend
        if on_gpus and devices is None:
            devices = range(world_size)
        # Port 0: the kernel chooses a free port. The parent serves the stores, so they survive the death of any rank.
        stores = [_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
        file = str(sys.modules[function.__module__].__file__)
        processes = [self._process(rank) for rank in range(world_size)]
        for rank, process in enumerate(processes):
            job = Job(
                file,
                function.__module__,
                function.__qualname__,
                arguments,
                rank,
                world_size,
                backend,
                devices[rank] if on_gpus and devices is not None else None,
                devices is not None and len(set(devices)) < world_size,
                stores[0].port,
                stores[1].port,
                envs[rank],
                paths[rank],
                installed,
                deadline_s,
            )
            process.read_stderr()  # drop the output of earlier runs
            process.pipe.send(job)
        results = self._collect(processes, deadline_s)
        wrong = [rank for rank, (kind, _) in enumerate(results) if kind != ("killed" if rank in dying else "returned")]
        if wrong:
            error = _failure(f"ranks {wrong} of {function.__name__} failed", results, processes)
            usable = self._lasting and not on_gpus and all(kind in ("returned", "raised") for kind, _ in results)
            self._go_on(processes) if usable else self.close()
            raise error
        values = [value for _, value in results]
        if on_gpus and dying:
            # What a dead peer leaves in the others, such as NCCL's communicators, mustn't meet the next run.
            self.close()
            return values
        # Only now may the ranks destroy their process groups; until here, others may be in their last collective.
        self._go_on(processes)
        if on_gpus:
            # A rank that hangs here would otherwise fail the next test, which isn't to blame.
            ends = self._collect(processes, END_S)
            if any(kind != "ended" for kind, _ in ends):
                error = _failure(f"ranks of {function.__name__} can't destroy their process groups", ends, processes)
                self.close()
                raise error
        return values

    def _go_on(self, processes: list[_Process]) -> None:
        """Let the processes leave a run, in which all ranks have returned or raised."""
        for process in processes:
            with contextlib.suppress(BrokenPipeError):
                process.pipe.send(None)

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.kill()
        self._processes.clear()

    def _process(self, rank: int) -> _Process:
        process = self._processes.get(rank)
        if process is not None and process.popen.poll() is not None:
            process.kill()
            process = None
        if process is None:
            self._started += 1
            env = self._env[rank] if self._env else {}
            process = self._processes[rank] = _Process(self._folder, self._started, env)
        return process

    def _collect(self, processes: list[_Process], deadline_s: float) -> list[tuple[str, Any]]:
        """Return each rank's next message: an outcome and its value or traceback.

        The outcomes are "returned", "raised", "killed", "exited" and "hung"; and "ended" once a rank on a GPU has
        destroyed its process groups.
        """
        results: list[tuple[str, Any]] = [("hung", "")] * len(processes)
        by_pipe = {process.pipe: rank for rank, process in enumerate(processes)}
        # A process that misses its deadline prints its stacks and exits; the grace time is for that.
        end = time.monotonic() + deadline_s + _GRACE_S
        while by_pipe and (left_s := end - time.monotonic()) > 0:
            for pipe in multiprocessing.connection.wait(list(by_pipe), left_s):
                assert isinstance(pipe, multiprocessing.connection.Connection)
                rank = by_pipe.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    status = processes[rank].popen.wait()
                    results[rank] = ("killed" if status < 0 else "exited", DEAD)
                if results[rank][0] == "raised":
                    end = min(end, time.monotonic() + self._grace_s)
        return results


def _failure(title: str, results: list[tuple[str, Any]], processes: list[_Process]) -> RankError:
    texts = (_describe(rank, *results[rank], process.read_stderr()) for rank, process in enumerate(processes))
    return RankError("\n".join([title, *texts]))


def _describe(rank: int, kind: str, value: Any, stderr: str) -> str:
    body = textwrap.indent(f"{value}\n[stderr] …{stderr[-_STDERR_CHARS:]}", "    ")
    return f"--- rank {rank} {kind}\n{body}"


def install(folder: Path, name: str, source: str, *, version: str = "1.0") -> Path:
    """Write a distribution with the backend `name` into `folder`, in the layout that pip installs.

    Args:
        folder: a folder that doesn't exist yet.
        name: the name of the backend and of its module.
        source: the module's source; its object `plugin` has the hooks.
        version: the distribution's version.

    Returns:
        `folder`, an element of a rank's `path`.
    """
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n{name} = {name}:plugin\n")
    (folder / f"{name}.py").write_text(source)
    return folder
