"""`comm-core run`: an unchanged program of torch.distributed, on the backend "comm"."""

from __future__ import annotations

import argparse
import functools
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "add_program", "check_program", "run", "run_program"]

_log = logging.getLogger("comm_core")
# What a program may ask for that "comm" also serves; None and "" let torch choose.
_REPLACED = frozenset({None, "", "gloo", "nccl", "cpu:gloo", "cuda:nccl", "cpu:gloo,cuda:nccl", "cuda:nccl,cpu:gloo"})


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "run",
        help='run a program of torch.distributed on the backend "comm"',
        usage="%(prog)s [-h] [-m] PROGRAM [ARGUMENT ...]",
        description='Runs a Python program as Python does, with "comm" in place of "gloo" and "nccl" in its call of '
        "torch.distributed.init_process_group. Under torchrun: torchrun --nproc-per-node 2 -m comm_core run train.py.",
    )
    add_program(parser)
    parser.set_defaults(run=run)


def add_program(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a Python program."""
    parser.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is the name of a module")
    parser.add_argument("program", metavar="PROGRAM", help="the program's file")
    parser.add_argument(
        "program_arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="the program's arguments"
    )
    parser.set_defaults(fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the program in this process; return 0 unless it exits by itself with another status."""
    check_program(args)
    _replace_backend()
    return run_program(args)


def check_program(args: argparse.Namespace) -> None:
    """Exit with a usage error if the program isn't a file and isn't to be a module."""
    if not args.is_module and not Path(args.program).is_file():
        args.fail(f"{args.program} isn't a file")


def run_program(args: argparse.Namespace) -> int:
    """Run the program in this process, as Python does; return 0 unless it exits by itself with another status."""
    sys.argv[:] = [args.program, *args.program_arguments]
    if args.is_module:
        sys.path.insert(0, "")
        runpy.run_module(args.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(args.program).absolute().parent))
        runpy.run_path(args.program, run_name="__main__")
    return 0


def _replace_backend() -> None:
    """Let every later call of `init_process_group` ask for the backend "comm"."""
    import torch.distributed as dist
    from torch.distributed import device_mesh, distributed_c10d

    stock: Callable[..., None] = dist.init_process_group

    @functools.wraps(stock)
    def init_process_group(backend: Any = None, *arguments: Any, **options: Any) -> None:
        if backend in _REPLACED:
            stock("comm", *arguments, **options)
            return
        _log.warning('comm_core: the program asks for the backend %r, which "comm" doesn\'t replace', backend)
        stock(backend, *arguments, **options)

    for module in (dist, distributed_c10d, device_mesh):
        vars(module)["init_process_group"] = init_process_group
