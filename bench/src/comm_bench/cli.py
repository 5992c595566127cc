"""`comm-core bench`: time every backend, other libraries' kernels and the machine's limits side by side; check sums."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from comm_core.command import contention, enough_gpus, joined, launch, under_torchrun
from comm_core.types import DTYPES

from comm_bench import stats
from comm_bench.cases import ALIASES, GROUP_SIZE, OPS, PLACES, BenchCase, parse_nbytes, shapes, sizes
from comm_bench.compare import compare
from comm_bench.document import Listener, footer, heading, preamble, read_rows, tables, with_partial_results
from comm_bench.progress import Progress
from comm_bench.results import Row, format_row, header, title

__all__ = ["add_parser", "run"]

_LARGEST = {"cuda": "64M", "cpu": "16M"}
_SMALLEST_NBYTES = 1 << 10
# What the odd sizes of a run with default sizes have more than a power of two, in bytes: whole elements, but not whole
# vectors, as what kernels do at a message's end has to be checked, too.
_ODD_NBYTES = 12
_HIDDEN_SIZE = 4096
_NO_GRAPHS = "-G {}: only GPUs have CUDA graphs, and these ranks use CPUs; leave it out, or give -G 0"
_FORMS = {op.partition(":")[2]: (op,) for op in OPS[2:]}
_OPS = {"all_reduce": OPS[:1], "fused": OPS[1:2], "both": OPS[:2], "fused_quant": OPS[2:], **_FORMS}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time every backend beside torch.distributed, other libraries' kernels and the machine's limits",
        description="Joins the job that torchrun started, or else starts processes on this host. Times chains of calls "
        "in which each call reads the previous one's output, alternates between the contenders, and compares the "
        "results exactly. The short flags have the same meaning as in nccl-tests.",
    )
    size = _argument_type(parse_nbytes)
    number = _argument_type(_positive)
    parser.add_argument("-b", dest="first", type=size, metavar="SIZE", help="smallest message (1K)")
    parser.add_argument("-e", dest="last", type=size, metavar="SIZE", help="largest message (64M on GPUs, 16M on CPUs)")
    parser.add_argument("-f", dest="factor", type=number, metavar="N", help="factor between sizes (2)")
    parser.add_argument("-i", dest="increment", type=size, metavar="SIZE", help="step between sizes instead")
    parser.add_argument("-n", dest="calls", type=number, metavar="N", help="calls in a chain (10 to 200, by size)")
    parser.add_argument("-w", dest="warmup", type=number, default=5, metavar="N", help="calls before the timing (5)")
    parser.add_argument(
        "-c", dest="checks", type=int, choices=(0, 1), default=1, help="1: compare the results; 0: don't (1)"
    )
    parser.add_argument(
        "-d",
        dest="dtypes",
        type=_argument_type(_dtypes),
        default="bfloat16",
        metavar="TYPE",
        help="dtypes, comma-separated: torch's names, half, float, double; or all (bfloat16)",
    )
    parser.add_argument(
        "-G",
        dest="graph",
        type=_argument_type(_not_negative),
        metavar="N",
        help="time N replays of a chain's CUDA graph together; 0: eager calls (on GPUs both, with N = 1)",
    )
    parser.add_argument("--op", choices=tuple(_OPS), default="all_reduce", help="which operations (all_reduce)")
    parser.add_argument("--place", choices=(*PLACES, "both"), default="both", help="out of place or in place (both)")
    counts = _argument_type(lambda text: tuple(map(_positive, text.split(","))))
    parser.add_argument("--tokens", type=counts, default=(), metavar="N,…", help="numbers of rows, instead of -b to -e")
    parser.add_argument(
        "--hidden", type=counts, default=(_HIDDEN_SIZE,), metavar="N,…", help=f"elements in a row ({_HIDDEN_SIZE})"
    )
    parser.add_argument(
        "--backends",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,…",
        help="backends and peers to time beside torch.distributed (all)",
    )
    parser.add_argument(
        "--repetitions", type=number, default=15, metavar="N", help=f"repetitions, at least {stats.MIN_SAMPLES} (15)"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE, or to stdout instead of the table",
    )
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="draw latency and bandwidth over bytes (needs matplotlib)"
    )
    parser.add_argument(
        "--read", type=pathlib.Path, metavar="FILE", help="show a file that --json wrote; measure nothing"
    )
    parser.add_argument(
        "--compare", type=pathlib.Path, nargs=2, metavar=("OLD", "NEW"), help="compare two files that --json wrote"
    )
    parser.add_argument("--nproc", type=number, default=2, metavar="N", help="processes to start (2)")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or show a recorded run; return 1 if an element was wrong or a process failed."""
    if args.compare is not None:
        return _compare(args)
    _check_arguments(args)
    if args.read is not None:
        return _read(args)
    if not under_torchrun():
        if args.graph and not enough_gpus(args.nproc):
            args.fail(_NO_GRAPHS.format(args.graph))
        return launch(args.nproc, args.arguments)
    with joined() as rank:
        if rank == 0 and (reason := contention()):
            sys.stderr.write(f"comm-core bench: times won't be this machine's best: {reason}\n")
        return _measure(args, prints=rank == 0)


def _check_arguments(args: argparse.Namespace) -> None:
    """End with a usage error if the arguments are invalid, before any process starts."""
    if args.repetitions < stats.MIN_SAMPLES:
        args.fail(f"--repetitions {args.repetitions}: a confidence interval needs at least {stats.MIN_SAMPLES}")
    if args.factor == 1 and not args.increment:
        args.fail("-f 1: sizes would stay the same; give a factor of at least 2, or a step with -i")
    if args.first == 0:
        args.fail("-b 0: the smallest message needs at least one byte")
    if args.last is not None and args.last < (args.first or _SMALLEST_NBYTES):
        args.fail(f"-e {args.last} is below -b {args.first or _SMALLEST_NBYTES}, so there is no size to measure")
    if args.tokens and _chosen_sizes(args):
        args.fail("--tokens takes the place of the sizes: leave -b, -e, -f and -i out")
    if OPS[0] not in _OPS[args.op] and not any("float" in dtype for dtype in args.dtypes):
        args.fail(f"-d {','.join(args.dtypes)}: the fused operation needs a floating-point dtype")
    if OPS[-1] in _OPS[args.op] and (width := next((each for each in args.hidden if each % GROUP_SIZE), None)):
        args.fail(f"--hidden {width}: scales for groups need a multiple of {GROUP_SIZE}; name another form by --op")
    if args.read is None and (os.environ["WORLD_SIZE"] if under_torchrun() else str(args.nproc)) == "1":
        args.fail("a single rank has nothing to reduce; start at least two")
    _check_output_paths(args)


def _check_output_paths(args: argparse.Namespace) -> None:
    """End with a usage error if a file can't be written; writing follows only after the whole measurement."""
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        args.fail("--plot needs matplotlib: pip install 'comm-bench[plot]'")
    for path in (args.plot, None if args.json in {None, "-"} else pathlib.Path(args.json)):
        if path is not None and not path.absolute().parent.is_dir():
            args.fail(f"can't write {path.name}: the folder {path.absolute().parent} doesn't exist")
        if path is not None and path.is_dir():
            args.fail(f"can't write {path}: it is a folder; name a file")
    if args.plot is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        if args.plot.suffix.removeprefix(".") not in known:
            args.fail(f"--plot {args.plot}: matplotlib can't write that format; choose from {', '.join(sorted(known))}")


def _measure(args: argparse.Namespace, *, prints: bool) -> int:
    from comm_bench.measure import Procedure
    from comm_bench.roster import UnknownContenderError
    from comm_bench.session import measure_all

    procedure = Procedure(args.calls, max(args.graph or 1, 1), args.warmup, args.repetitions, bool(args.checks))
    printer = _Printer(tables=args.json != "-")
    try:
        document, rows = measure_all(
            functools.partial(_cases, args),
            ["comm-core", *args.arguments],
            procedure,
            args.backends,
            printer if prints else Listener(),
        )
    except UnknownContenderError as error:
        args.fail(str(error))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes another one on
        if printer.rows:  # on the printing rank
            _write_files(args, with_partial_results(printer.document, printer.rows), printer.rows)
        raise
    if prints:
        _print_text(args, footer(document))
        _write_files(args, document, rows)
    return 1 if document["wrong"] else 0


def _cases(args: argparse.Namespace, device_type: str) -> list[BenchCase]:
    """Return the cases to measure, in the order of the tables."""
    if args.graph and device_type != "cuda":
        raise ValueError(_NO_GRAPHS.format(args.graph))
    both = ("eager", "graph") if device_type == "cuda" else ("eager",)
    modes = both if args.graph is None else ("graph",) if args.graph else ("eager",)
    places = PLACES if args.place == "both" else (args.place,)
    last = args.last or parse_nbytes(_LARGEST[device_type])
    sweep = list(sizes(args.first or _SMALLEST_NBYTES, last, args.factor or 2, args.increment or 0))
    if not _chosen_sizes(args):
        sweep = sorted([*sweep, *(sweep[index] + _ODD_NBYTES for index in (0, len(sweep) // 2, -2))])
    return [
        BenchCase(op, mode, place, dtype, device_type, shape)
        for op, mode, place, dtype in itertools.product(_OPS[args.op], modes, places, args.dtypes)
        if op == "all_reduce" or "float" in dtype
        for shape in shapes(op, dtype, sweep, args.tokens, args.hidden)
    ]


def _chosen_sizes(args: argparse.Namespace) -> bool:
    """Return whether the command line says which sizes to measure."""
    return (args.first, args.last, args.factor, args.increment) != (None,) * 4


def _read(args: argparse.Namespace) -> int:
    """Show a recorded run; return 1 if it has wrong elements."""
    with _reading(args, "--read", args.read):
        document = json.loads(args.read.read_text())
        rows = read_rows(document)
        text = [*preamble(document), *tables(rows, _columns()), *footer(document)]
    _print_text(args, text)
    _write_files(args, document, rows)
    return 1 if document["wrong"] else 0


def _compare(args: argparse.Namespace) -> int:
    """Show how the times of two recorded runs differ."""
    runs = []
    for path in args.compare:
        with _reading(args, "--compare", path):
            runs.append(read_rows(json.loads(path.read_text())))
    print(*compare(*runs), sep="\n", flush=True)
    return 0


@contextlib.contextmanager
def _reading(args: argparse.Namespace, option: str, path: pathlib.Path) -> Iterator[None]:
    """End with a usage error if the block can't read a record."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        args.fail(f"{option} {path} can't be read: {type(error).__name__}: {error}")


def _columns() -> int | None:
    """Return the width of the terminal; None if stdout isn't one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _print_text(args: argparse.Namespace, lines: Iterable[str]) -> None:
    if args.json != "-":
        print(*lines, sep="\n", flush=True)


def _write_files(args: argparse.Namespace, document: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the JSON and the picture that the arguments ask for."""
    text = json.dumps(document, indent=1)
    if args.json == "-":
        print(text, flush=True)
    elif args.json is not None:
        pathlib.Path(args.json).write_text(text + "\n")
    if args.plot is not None:
        from comm_bench.plot import draw

        draw(rows, args.plot, heading(document))


class _Printer(Progress):
    """Prints rows as they are measured, and the progress.

    Attributes:
        document: the record so far, without the rows.
        rows: the rows so far.
    """

    def __init__(self, *, tables: bool) -> None:
        super().__init__()
        self.document: dict[str, Any] = {}
        self.rows: list[Row] = []
        self._tables = tables
        self._table = ""

    def on_start(self, document: dict[str, Any]) -> None:
        super().on_start(document)
        self.document = document
        if self._tables:
            print(*preamble(document), sep="\n", flush=True)

    def on_case_start(self, number: int, count: int, case: BenchCase) -> None:
        super().on_case_start(number, count, case)
        table = title(case.op, case.mode, case.place)
        self._table, above = table, self._table
        if self._tables and table != above:
            self.show("")
            print("", f"# {table}", header(_columns()), sep="\n", flush=True)

    def on_case_end(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self.show("")
        if self._tables:
            print(*(format_row(row, _columns()) for row in rows), sep="\n", flush=True)


def _argument_type(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap a converter for argparse, so that a usage error is the converter's own message."""

    def checked(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def _positive(text: str) -> int:
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{text!r} isn't a whole number of at least {least}")
    return int(text)


def _dtypes(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(DTYPES)
    names = tuple(dict.fromkeys(ALIASES.get(name, name) for name in text.split(",")))
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise ValueError(f"{text!r}: {unknown[0]!r} isn't one of all, {', '.join((*ALIASES, *DTYPES))}")
    return names
