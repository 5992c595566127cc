"""Joining the job that torchrun started, or starting one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence

__all__ = ["enough_gpus", "joined", "launch", "under_torchrun"]


def under_torchrun() -> bool:
    """Whether this process is a rank of a job: torchrun, or who speaks its language, has set RANK and WORLD_SIZE."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run `comm-core` with these arguments in a job of `nproc` processes on this host; its exit status, 0 or 1."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    # torchrun warns where this isn't set, and takes one thread a process then.
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(  # noqa: S603 - torchrun with our own arguments
        # After "--" torchrun takes none of our options for its own.
        [*torchrun, "-m", "--", "comm_core", *arguments],
        env=environ,
        check=False,
    )
    return 1 if done.returncode else 0


def enough_gpus(nproc: int) -> bool:
    """Whether each of so many processes on this host can have a GPU of its own."""
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= nproc


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Be a rank of the job: each with a GPU of its own where there are enough, else all on CPUs. Yields the rank.

    An exception ends the process with status 1 and its traceback.
    """
    import torch
    import torch.distributed as dist

    import comm_core as comm

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if enough_gpus(local_size):
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    elif torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") and torch.cuda.device_count() == 1:
        # One visible device a process.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
        comm.close()
    except Exception:  # noqa: BLE001 - told, and the process ends with it
        # To leave in order would wait for peers, and for a GPU that may never answer again; torchrun ends the others.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
