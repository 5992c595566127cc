"""Commands as ranks of a test's job, as if torchrun had started them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import comm_core as comm
import comm_core.cli
import pytest
import torch.distributed as dist
from comm_bench import cli, tune
from comm_bench.backends import _Terminal
from comm_bench.cases import OPS, BenchCase
from comm_bench.contenders import Job
from comm_bench.measure import Procedure
from comm_bench.variants import Search, Tried, search

if TYPE_CHECKING:
    from comm_core.tuning import VariantChoice


@contextlib.contextmanager
def in_job(module: str) -> Iterator[None]:
    """Let the command in this module be a rank of the current job, as if torchrun had started it."""

    @contextlib.contextmanager
    def joined() -> Iterator[int]:
        yield dist.get_rank()
        comm.close()

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    with mock.patch(f"{module}.joined", joined):
        yield


def printed(module: str, arguments: Sequence[str]) -> tuple[Any, str, str]:
    """Run the installed command in this module as a rank of the current job; return its status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with in_job(module), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: Any = comm_core.cli.main(arguments)
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


def tuned(largest_nbytes: int, calls: int = 20) -> tuple[Any, str, str]:
    """Run `comm-core tune` for messages of up to this size; return its status, stdout and stderr.

    A busy machine gets the time for all of them.
    """
    with (
        mock.patch.dict(tune._LARGEST_NBYTES, cpu=largest_nbytes),
        mock.patch.dict(tune._CALLS, cpu=calls),
        mock.patch.object(tune, "_QUICK_LIMIT_S", 1000.0),
    ):
        return printed("comm_bench.tune", ["tune", "--quick", "--json"])


# The times of variants in microseconds, by the length of a row; "broken" fails.
TIMES_US = {
    "late": {4096: 10, 5000: 10, 7168: 10},
    "later": {4096: 20, 5000: 20, 7168: 20},
    "prompt": {4096: 5, 5000: 5, 7168: 5},
    "uneven": {4096: 1, 5000: 21, 7168: 4},
}


class Varied(_Terminal):
    """torch.distributed, with variants that are never called."""

    choices: Sequence[VariantChoice] = ()

    def variants(self, case: BenchCase) -> tuple[str, ...]:
        # With rows of 5000 elements, another one is in use.
        first = ("later", "late") if case.shape[1] == 5000 else ("late", "later")
        return (*first, "broken", "prompt", "uneven")

    def use_variants(self, choices: Sequence[VariantChoice]) -> None:
        self.choices = choices


def times_of(_job: Any, case: BenchCase, variants: Sequence[Any], procedure: Procedure, _absent: Any) -> list[Any]:
    """Stand for `comm_bench.measure.measure`."""
    works = [variant for variant in variants if variant.name in TIMES_US]
    times_us = [(TIMES_US[variant.name][case.shape[1]],) * procedure.repetitions for variant in works]
    return [
        SimpleNamespace(contender=variant, times_us=times, wrong=0)
        for variant, times in zip(works, times_us, strict=True)
    ]


def searched(shapes: Sequence[tuple[int, int]], limit_s: float) -> tuple[Tried, Any, list[int]]:
    """Search among variants for one fused message in these shapes; return the result, the choices then in use, and
    the sizes that progress showed."""
    job, shown = Job(comm.get_backend().device), list[int]()
    contender = Varied(job)
    cases = [BenchCase(OPS[1], "eager", "out", "float32", "cpu", shape) for shape in shapes]
    settings = Search([cases], Procedure(3, 1, 1, 7, checks=True), None, limit_s)
    with mock.patch("comm_bench.variants.measure", times_of):
        tried = search(job, [contender], settings, lambda *shown_case: shown.append(shown_case[2].nbytes), pytest.fail)
    job.close()
    comm.close()
    return tried, contender.choices, shown


def commanded(arguments: Sequence[str], path: str) -> tuple[int, dict[str, Any]]:
    """Run the command as a rank of the current job; return its exit status on this rank and the recorded document."""

    # Call comm_bench's parser directly: here the command `comm-core` sees only the planted distributions.
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["bench", *arguments, "--json", path])
    args.arguments = ["bench", *arguments]
    with in_job("comm_bench.cli"):
        status = args.run(args)
    dist.barrier()  # until the first rank has written
    return status, json.loads(Path(path).read_text())
