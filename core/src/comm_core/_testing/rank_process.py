"""What the processes of `comm_core._testing.ranks.Ranks` run: one rank's part of each job."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import multiprocessing.connection
import os
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import comm_core
from comm_core._plugins import crashes, discovery, installed

__all__ = ["END_S", "Job", "side_store", "work"]

_dist: Any = dist  # torch lists some of its public names only at run time
#: Seconds that a rank on a GPU gets, after a run, to destroy its process groups.
END_S = 60
# The timeout of Gloo and of the stores, in seconds: shorter than a run's deadline, because their errors say more.
_TORCH_TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True)
class Job:
    """One rank's part of a run, as sent to the rank's process."""

    file: str
    module: str
    function: str
    arguments: tuple[Any, ...]
    rank: int
    world_size: int
    backend: str
    device: int | None
    shares_gpus: bool
    store_port: int
    side_port: int
    env: Mapping[str, str]
    path: tuple[str, ...]
    installed: bool
    deadline_s: float


_side: list[Any] = []


def side_store() -> Any:
    """Return a second store, new in each run, over which a test's ranks communicate independently of comm_core."""
    return _side[0]


def work(descriptor: str) -> None:
    """Take jobs from the pipe with this descriptor until it closes."""
    crashes.stop_watching()
    # What is imported by now stays for the process's life: collections of garbage needn't look at it again and again.
    gc.freeze()
    pipe: multiprocessing.connection.Connection[Any, Any] = multiprocessing.connection.Connection(int(descriptor))
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        # At the deadline, print every thread's stack and end the process, even if the parent has died.
        faulthandler.dump_traceback_later(job.deadline_s, exit=True)
        with contextlib.ExitStack() as stack:
            try:
                result = ("returned", _call(job, stack))
            except BaseException:  # noqa: BLE001 - the test sees SystemExit too
                result = ("raised", traceback.format_exc())
            pipe.send(result)
            with contextlib.suppress(EOFError):
                pipe.recv()  # every rank has returned
            if job.device is not None:
                faulthandler.dump_traceback_later(END_S, exit=True)
                _free_graphs()
        faulthandler.cancel_dump_traceback_later()
        if job.device is not None:
            pipe.send(("ended", None))


def _call(job: Job, stack: contextlib.ExitStack) -> Any:
    if "." in job.module:
        module = importlib.import_module(job.module)
    else:  # a test's module, which isn't in a package
        sys.path.insert(0, str(Path(job.file).parent))
        module = importlib.import_module(Path(job.file).stem)
        sys.path.pop(0)
    stack.enter_context(_environment(job))
    timeout = timedelta(seconds=_TORCH_TIMEOUT_S)
    store, side = (
        _dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout) for port in (job.store_port, job.side_port)
    )
    _side[:] = [side]
    stack.callback(_tear_down)
    device = None if job.device is None else torch.device("cuda", job.device)
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        job.backend,
        store=store,
        rank=job.rank,
        world_size=job.world_size,
        timeout=timeout,
        device_id=None if job.shares_gpus else device,
    )
    # All ranks are connected before the first one may leave: Gloo fails on a rank whose peer leaves in between.
    side.set(f"connected/{job.rank}", "")
    side.wait([f"connected/{rank}" for rank in range(job.world_size)])
    return getattr(module, job.function)(*job.arguments)


def _free_graphs() -> None:
    """Free the CUDA graphs that the run left: NCCL destroys a communicator only after all graphs with its calls.

    Inductor keeps the graphs that it recorded. Others are in cycles of references, as when an exception's traceback
    holds the frames that hold the graph.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()


def _tear_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # Close the handles that the test left open. Without process groups, this doesn't wait for peers.
    comm_core.close()


@contextlib.contextmanager
def _environment(job: Job) -> Iterator[None]:
    """Set the job's environment variables, and limit the discovery of plugins as the job says."""
    environ, path, metadata = dict(os.environ), list(sys.path), vars(installed)["metadata"]
    os.environ.update(job.env)
    # The test's own folder, too: a plugin may be a class of the test's module.
    sys.path[:0] = [*job.path, str(Path(job.file).parent)]
    if not job.installed:
        # Replace only core's reference to `importlib.metadata`, because Triton finds its driver by metadata too.
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
