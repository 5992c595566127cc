"""For authors of subcommands of `comm-core`: start or join a job, and print tables.

A distribution adds a subcommand by an entry point in the group `comm_core.commands`. The entry's name is the
subcommand, its value a module, or an object, with a function `add_parser`:

```toml
[project.entry-points."comm_core.commands"]
hello = "my_package.hello"
```

```python
def add_parser(subparsers):
    parser = subparsers.add_parser("hello", help="greet every rank")
    parser.set_defaults(run=run)


def run(args):
    if not command.under_torchrun():
        return command.launch(2, args.arguments)
    with command.joined() as rank:
        print(f"hello from rank {rank}")
    return 0
```

`run` returns the exit status: 0 fine, 1 a problem found; 2 is argparse's, for a usage error. `args.arguments` holds all
arguments of `comm-core`, so that a command can start itself again in other processes. `comm-core` lists commands by
their distribution's summary, and imports only the one that is called; one that can't be imported stops no other. Its
own commands keep their names.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import uuid
from collections.abc import Iterator, Sequence

from comm_core._control.deadline import describe
from comm_core._plan.explain import size, table

__all__ = ["GROUP", "describe", "enough_gpus", "joined", "launch", "size", "table", "under_torchrun"]

#: The entry-point group of commands.
GROUP = "comm_core.commands"


def under_torchrun() -> bool:
    """Whether this process is a rank of a job: torchrun, or a launcher like it, has set RANK and WORLD_SIZE."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run `comm-core` with these arguments in a job of `nproc` processes on this host, as torchrun does.

    Args:
        nproc: how many processes.
        arguments: of `comm-core`, the subcommand first.

    Returns:
        0; 1 where a process failed, which has printed why; 128 and its number where a signal ended the job.
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
    """Be a rank of the job that torchrun started: with a GPU of its own where there are enough, else all on CPUs.

    Initialises the world group, and at the end closes every handle and destroys the group. An exception inside ends the
    process with status 1 and its traceback, without waiting for the other ranks.

    Yields:
        The rank.
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
