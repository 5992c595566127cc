"""Runs functions of a test in real processes: the ranks of a torch.distributed job over Gloo on this host.

    def total(x):                       # at the top level of a test's module; runs in every rank
        tensor = torch.tensor([x + dist.get_rank()])
        dist.all_reduce(tensor)
        return tensor.item()

    def test_total(ranks):              # the fixture is in conftest.py
        assert ranks.run(total, 5, world_size=2) == [11, 11]

The processes stay for the whole test session, since importing torch takes seconds; each run is a job of its own, with a
store of its own, and whatever a run leaves behind on purpose (a dead rank) is replaced before the next. A run that goes
wrong ends all processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import comm_core
import torch
import torch.distributed as dist
from comm_core._plugins import discovery, installed

__all__ = ["DEAD", "RankError", "Ranks", "install", "side_store"]

#: What `Ranks.run` returns for a rank that was expected to die and did.
DEAD = "dead"
# Gloo and the stores give up after this, in seconds: below the deadline of a run, so that the error tells more.
_TORCH_TIMEOUT_S = 60
# Once a rank failed, how long the others may still take to say what they saw, in seconds.
_GRACE_S = 15
_STDERR_CHARS = 4000
_START = "import sys; sys.path.insert(0, sys.argv[1]); import harness; harness.work(int(sys.argv[2]))"


class RankError(AssertionError):
    """A rank raised, died or didn't return in time; the text holds every rank's traceback and the end of its stderr."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """One rank's part of a run, on its way to the process."""

    file: str
    function: str
    arguments: tuple[Any, ...]
    rank: int
    world_size: int
    backend: str
    store_port: int
    side_port: int
    env: Mapping[str, str]
    path: tuple[str, ...]
    deadline_s: float


class _Process:
    """A process that can be a rank, and this side's end of the pipe to it."""

    def __init__(self, folder: Path, number: int) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("COMM_CORE_")}
        # One thread a process: several of them share the host's cores.
        environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.stderr = folder / f"process{number}.stderr"
        self.offset = 0
        self.pipe, theirs = multiprocessing.Pipe()
        with self.stderr.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _START, str(Path(__file__).parent), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=environ,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that its children can be ended with it
            )
        theirs.close()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.pipe.close()

    def said(self) -> str:
        """What it wrote to stderr since this was called last."""
        with self.stderr.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        self.offset += len(text)
        return text.decode(errors="replace")


class Ranks:
    """A pool of processes that `run` makes the ranks of a job.

    Args:
        folder: for what the processes write to stdout and stderr.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
        deadline_s: float = 120.0,
        dying: Collection[int] = (),
    ) -> list[Any]:
        """Call `function(*arguments)` in every rank of a new job, with the default process group initialised.

        Args:
            function: at the top level of its module.
            arguments: what can be pickled.
            world_size: how many ranks.
            backend: of the default process group; where it names CUDA, each rank has the GPU of its number.
            env: environment variables for the call; of all ranks, or one mapping a rank.
            path: folders in front of `sys.path` for the call, a sequence a rank, see `install`. Backends in other
                folders, such as those that happen to be installed, stay out of sight.
            deadline_s: for the whole run, in seconds.
            dying: ranks whose process a signal ends.

        Returns:
            What each rank returned, by rank; `DEAD` for a rank that died as announced.

        Raises:
            RankError: a rank raised, died or didn't return in time; all processes were killed.
        """
        envs = [env or {}] * world_size if env is None or isinstance(env, Mapping) else list(env)
        paths = [tuple(map(str, folders)) for folders in path] or [()] * world_size
        if len(envs) != world_size or len(paths) != world_size:
            raise ValueError(f"{len(envs)} environments and {len(paths)} paths for {world_size} ranks")
        # Port 0: the kernel chooses, so no other job can have it. The parent serves, so no rank's death takes a store.
        stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
        file = sys.modules[function.__module__].__file__
        assert file is not None
        processes = [self._process(rank) for rank in range(world_size)]
        for rank, process in enumerate(processes):
            job = _Job(
                file,
                function.__qualname__,
                arguments,
                rank,
                world_size,
                backend,
                stores[0].port,
                stores[1].port,
                envs[rank],
                paths[rank],
                deadline_s,
            )
            process.said()
            process.pipe.send(job)
        results = self._collect(processes, deadline_s)
        wrong = [rank for rank, (kind, _) in enumerate(results) if kind != ("killed" if rank in dying else "returned")]
        if wrong:
            text = "\n".join(_describe(rank, *results[rank], processes[rank].said()) for rank in range(world_size))
            self.close()
            raise RankError(f"ranks {wrong} of {function.__name__} failed\n{text}")
        # Only now does any rank leave its process groups: others may have been in their last collective.
        for process in processes:
            with contextlib.suppress(BrokenPipeError):
                process.pipe.send(None)
        return [value for _, value in results]

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.end()
        self._processes.clear()

    def _process(self, rank: int) -> _Process:
        process = self._processes.get(rank)
        if process is not None and process.popen.poll() is not None:
            process.end()
            process = None
        if process is None:
            self._started += 1
            process = self._processes[rank] = _Process(self._folder, self._started)
        return process

    def _collect(self, processes: list[_Process], deadline_s: float) -> list[tuple[str, Any]]:
        """How each call ended: "returned", "raised", "killed", "exited" or "hung"; and the value or the traceback."""
        results: list[tuple[str, Any]] = [("hung", "")] * len(processes)
        by_pipe = {process.pipe: rank for rank, process in enumerate(processes)}
        # A process that misses its deadline prints its stacks and exits; the rest is for those that can't.
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
                    end = min(end, time.monotonic() + _GRACE_S)
        return results


def _describe(rank: int, kind: str, value: Any, stderr: str) -> str:
    body = textwrap.indent(f"{value}\n[stderr] …{stderr[-_STDERR_CHARS:]}", "    ")
    return f"--- rank {rank} {kind}\n{body}"


def install(folder: Path, name: str, source: str, *, version: str = "1.0") -> Path:
    """Write a distribution that brings the backend `name` into `folder`, as pip would lay it out.

    Args:
        folder: where to; it is created.
        name: of the backend, and of its module.
        source: of the module; an object `plugin` in it has the hooks.
        version: of the distribution.

    Returns:
        `folder`, an element of a rank's `path`.
    """
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{discovery.GROUP}]\n{name} = {name}:plugin\n")
    (folder / f"{name}.py").write_text(source)
    return folder


# What follows runs in the processes.

_side: list[Any] = []


def side_store() -> Any:
    """A store beside the job's, new in each run: for what ranks of a test tell each other behind comm_core's back."""
    return _side[0]


def work(pipe_number: int) -> None:
    """Take jobs from the pipe until it closes."""
    pipe: multiprocessing.connection.Connection[Any, Any] = multiprocessing.connection.Connection(pipe_number)
    while True:
        try:
            job: _Job = pipe.recv()
        except EOFError:
            return
        # Prints every thread's stack and ends the process, also where nobody is left to kill it.
        faulthandler.dump_traceback_later(job.deadline_s, exit=True)
        with contextlib.ExitStack() as stack:
            try:
                result = ("returned", _call(job, stack))
            except BaseException:  # noqa: BLE001 - also SystemExit is the test's to judge
                result = ("raised", traceback.format_exc())
            pipe.send(result)
            with contextlib.suppress(EOFError):
                pipe.recv()  # every rank has returned
        faulthandler.cancel_dump_traceback_later()


def _call(job: _Job, stack: contextlib.ExitStack) -> Any:
    sys.path.insert(0, str(Path(job.file).parent))
    module = importlib.import_module(Path(job.file).stem)
    sys.path.pop(0)
    stack.enter_context(_environment(job))
    timeout = timedelta(seconds=_TORCH_TIMEOUT_S)
    store, side = (
        dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout) for port in (job.store_port, job.side_port)
    )
    _side[:] = [side]
    stack.callback(_leave)
    device = torch.device("cuda", job.rank) if "cuda" in job.backend else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        job.backend, store=store, rank=job.rank, world_size=job.world_size, timeout=timeout, device_id=device
    )
    return getattr(module, job.function)(*job.arguments)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # What the test didn't close; without its groups this waits for nobody.
    comm_core.close()


@contextlib.contextmanager
def _environment(job: _Job) -> Iterator[None]:
    """The job's environment variables and its plugins, found by `importlib.metadata` in the job's folders alone."""
    environ, path, metadata = dict(os.environ), list(sys.path), installed.metadata
    os.environ.update(job.env)
    # The test's own folder, too: a plugin may be a class of the test's module.
    sys.path[:0] = [*job.path, str(Path(job.file).parent)]
    # For core's list of plugins alone: Triton finds its driver by metadata, too.
    vars(installed)["metadata"] = types.SimpleNamespace(
        distributions=lambda **kwargs: metadata.distributions(path=list(job.path), **kwargs)
    )
    importlib.invalidate_caches()
    discovery.reset()
    try:
        yield
    finally:
        vars(installed)["metadata"] = metadata
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environ)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(tuple(f"{folder}/" for folder in job.path)):
                del sys.modules[name]
