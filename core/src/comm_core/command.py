"""Helpers for authors of subcommands of `comm-core`: start or join a job, and print tables.

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

`run` returns the exit status: 0 fine, 1 a problem found; argparse exits with 2 for a usage error. `args.arguments` has
all arguments of `comm-core`, so that a command can start itself again in other processes. `comm-core` describes each
command by its distribution's summary and imports only the called one, so a broken command doesn't affect the others.
The names of core's own commands can't be taken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from comm_core._control.deadline import describe, run_with_deadline
from comm_core._plan.explain import size, table
from comm_core.env import Settings, UnreadableSettingError
from comm_core.tuning import parse_size

__all__ = [
    "GROUP",
    "contention",
    "describe",
    "enough_gpus",
    "joined",
    "launch",
    "parse_size",
    "size",
    "table",
    "under_torchrun",
]

# A rank's program: `comm-core`, which Ctrl-C ends at once until `joined` has imported what it needs.
_RANK = (
    # The module under `signal`, which imports nothing.
    "import _signal, sys; _signal.signal(_signal.SIGINT, _signal.SIG_DFL); "
    "from comm_core.cli import main; sys.exit(main())"
)
# The longest that a rank which ends waits for the job's store, in seconds.
_STORE_S = 10.0
# In the job's store: the reader of a rank's stdout has ended.
_READER_ENDED = "comm_core/reader_ended"
GROUP = "comm_core.commands"
"""The entry-point group of commands."""


def under_torchrun() -> bool:
    """Return whether this process is a rank of a job: torchrun or a similar launcher has set RANK and WORLD_SIZE."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run `comm-core` with these arguments in a job of `nproc` processes on this host, as torchrun does.

    Args:
        nproc: the number of processes.
        arguments: the arguments of `comm-core`, the subcommand first.

    Returns:
        0; 1 if a process failed, after that process printed the reason; 2 for a usage error that a process found; 128
        plus the signal's number if a signal ended the job.
    """
    if reason := _unreadable_settings():
        _print_error(reason)
        return 2
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Without it torchrun warns, and sets one thread per process.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # They log how torchrun ends the other processes after one has failed, or after Ctrl-C.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
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
        elastic_launch(config, sys.executable)("-c", _RANK, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it couldn't print a reason
            _print_error(f"rank {rank}: {failure.message}")
        return 2 if failure.exitcode == 2 else 1
    except SignalException as ended:
        return 128 + ended.sigval
    return 0


def contention(ranks: int | None = None) -> str:
    """Return a sentence if this host's processors can't each be one rank's own, so that times say little; else "".

    Args:
        ranks: the number of ranks on this host that start now or have just started; None: those of this rank's job.
    """
    ranks = _ranks_here() if ranks is None else ranks
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if ranks > cores:
        return f"{ranks} ranks share {cores} processor{'s'[: cores > 1]}, and wait for each other's turns"
    if ranks + load > cores + 1:
        return f"this machine is busy: a load of {load:.1f} on {cores} processors, without the {ranks} ranks"
    return ""


def enough_gpus(nproc: int) -> bool:
    """Return whether this host has a GPU for each of `nproc` processes."""
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() >= nproc


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Join the job that torchrun started: each rank with a GPU of its own if there are enough, else all on CPUs.

    Initialises the world group, and at the end closes every handle and destroys the group. An exception inside prints
    its traceback and ends the process with status 1, without waiting for the other ranks; Ctrl-C, and the end of the
    reader of any rank's stdout, such as `head`, end it without a word. An environment variable of core's that can't be
    read ends it with status 2.

    Yields:
        This process's rank in the job.
    """
    if reason := _unreadable_settings():
        if os.environ["RANK"] == "0":
            _print_error(reason)
        sys.exit(2)
    _set_ctrl_c(signal.SIG_DFL)  # an import of native code turns KeyboardInterrupt into other errors
    import torch
    import torch.distributed as dist

    import comm_core as comm

    _set_ctrl_c(signal.default_int_handler)

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = _ranks_here()
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
    # An orderly end would wait for peers, and for a GPU that may never respond; torchrun ends the other ranks.
    except KeyboardInterrupt:
        _exit(130)  # 128 and the number of SIGINT
    except BrokenPipeError:
        _ask_store(lambda store: store.set(_READER_ENDED, "1"))
        _exit(1)
    except Exception:  # noqa: BLE001 - printed, and the process ends with it
        if not _ask_store(lambda store: store.check([_READER_ENDED])):  # else a peer has ended for that, before this
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        _exit(1)
    dist.destroy_process_group()


def _ask_store(operation: Callable[[Any], object]) -> object:
    """Return what `operation` returns for the job's store; None if the store is gone, maybe with the rank that held it.

    Under `launch` and torchrun the launcher holds the store, and outlives the ranks.
    """
    import torch.distributed as dist

    from comm_core._control.store import store_of

    world: Any = dist.group.WORLD
    with contextlib.suppress(Exception):
        store = store_of(world)
        return run_with_deadline(lambda: operation(store), _STORE_S, name="the job's store")
    return None


def _exit(status: int) -> NoReturn:
    """End this process at once."""
    from comm_core._plugins.crashes import end_journal

    end_journal()
    os._exit(status)


def _set_ctrl_c(handler: Any) -> None:
    """Let Ctrl-C end this process at once, or raise KeyboardInterrupt. Only the main thread may choose."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def _ranks_here() -> int:
    """Return the number of the job's ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def _print_error(text: str) -> None:
    sys.stderr.write(f"comm-core: {text}\n")


def _unreadable_settings() -> str:
    """Return why an environment variable of core's can't be read; "" if all can."""
    try:
        Settings.read()
    except UnreadableSettingError as error:
        return "\n".join((str(error), *error.excerpt))
    return ""
