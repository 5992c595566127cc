"""Joining the job that torchrun started, or starting one."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import uuid
from collections.abc import Iterator, Sequence

__all__ = ["enough_gpus", "joined", "launch", "under_torchrun"]


def under_torchrun() -> bool:
    """Whether this process is a rank of a job: torchrun, or who speaks its language, has set RANK and WORLD_SIZE."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run `comm-core` with these arguments in a job of `nproc` processes on this host, as torchrun does.

    Returns:
        0; 1 where a process failed, which has said why; 128 and its number where a signal ended the job.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun warns where this isn't set, and takes one thread a process then.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "comm_core", *arguments)
    except ChildFailedError:
        return 1
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


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
