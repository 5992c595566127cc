"""`comm-core bench`: every backend of this machine, its peers and its limits, timed side by side and checked."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from comm_core.command import enough_gpus, joined, launch, under_torchrun
from comm_core.types import DTYPES, OPS

from comm_bench import stats
from comm_bench.cases import ALIASES, PLACES, BenchCase, parse_nbytes, shapes, sizes
from comm_bench.document import Listener, footer, heading, preamble, read_rows, tables
from comm_bench.results import Row, header, line, title

__all__ = ["add_parser", "run"]

_LARGEST = {"cuda": "64M", "cpu": "16M"}
_HIDDEN_SIZE = 4096
_NO_GRAPHS = "-G {}: graphs are CUDA's, and these ranks have CPU tensors"
_OPS = {"all_reduce": OPS[:1], "fused": OPS[1:], "both": OPS}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time every backend beside torch.distributed, its peers and the machine's limits",
        description="Joins the job that torchrun started, else starts processes on this host. Times chains in which "
        "every call reads what the call before it wrote, contenders in turns, and compares the results exactly. The "
        "short flags mean what they mean to nccl-tests.",
    )
    size = _converted(parse_nbytes, "bytes")
    number = _converted(_positive, "number")
    parser.add_argument("-b", dest="first", type=size, default="1K", metavar="SIZE", help="smallest message (1K)")
    parser.add_argument("-e", dest="last", type=size, metavar="SIZE", help="largest message (64M on GPUs, 16M on CPUs)")
    parser.add_argument("-f", dest="factor", type=number, default=2, metavar="N", help="factor between sizes (2)")
    parser.add_argument("-i", dest="increment", type=size, default=0, metavar="SIZE", help="step between sizes instead")
    parser.add_argument("-n", dest="calls", type=number, metavar="N", help="calls in a chain (10 to 200, by size)")
    parser.add_argument("-w", dest="warmup", type=number, default=5, metavar="N", help="calls before anything (5)")
    parser.add_argument(
        "-c", dest="checks", type=int, choices=(0, 1), default=1, help="whether results are compared (1)"
    )
    parser.add_argument(
        "-d",
        dest="dtypes",
        type=_converted(_dtypes, "dtypes"),
        default="bfloat16",
        metavar="TYPE",
        help="of the elements, several with commas, or all: torch's names, half, float, double (bfloat16)",
    )
    parser.add_argument(
        "-G",
        dest="graph",
        type=_converted(_not_negative, "number"),
        metavar="N",
        help="replays of a CUDA graph of a chain that are timed together; 0: eager calls (on GPUs both, N being 1)",
    )
    parser.add_argument("--op", choices=tuple(_OPS), default="all_reduce", help="which operations (all_reduce)")
    parser.add_argument("--place", choices=(*PLACES, "both"), default="both", help="out of or in place (both)")
    counts = _converted(lambda text: tuple(map(_positive, text.split(","))), "numbers")
    parser.add_argument("--tokens", type=counts, default=(), metavar="N,…", help="rows, instead of -b to -e")
    parser.add_argument(
        "--hidden", type=counts, default=(_HIDDEN_SIZE,), metavar="N,…", help=f"elements a row ({_HIDDEN_SIZE})"
    )
    parser.add_argument(
        "--backends",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,…",
        help="backends and peers to time beside torch.distributed (all)",
    )
    parser.add_argument(
        "--repetitions", type=number, default=15, metavar="N", help=f"of each timing, at least {stats.FEWEST} (15)"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON there; without FILE to stdout, and no table"
    )
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="draw latency and bandwidth over bytes (takes matplotlib)"
    )
    parser.add_argument("--read", type=pathlib.Path, metavar="FILE", help="show what --json wrote; measure nothing")
    parser.add_argument("--nproc", type=number, default=2, metavar="N", help="processes to start (2)")
    parser.set_defaults(run=run, fail=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or read a recorded run; 1 where an element was wrong or a process failed."""
    _refuse(args)
    if args.read is not None:
        return _read(args)
    if not under_torchrun():
        if args.graph and not enough_gpus(args.nproc):
            args.fail(_NO_GRAPHS.format(args.graph))
        return launch(args.nproc, args.arguments)
    with joined() as rank:
        return _measure(args, speaks=rank == 0)


def _refuse(args: argparse.Namespace) -> None:
    """End with a usage error where the arguments can't be right, before anything is started."""
    if args.repetitions < stats.FEWEST:
        args.fail(f"--repetitions {args.repetitions}: fewer than {stats.FEWEST} give no confidence interval")
    if args.factor < 2 and not args.increment:
        args.fail(f"-f {args.factor}: sizes would stay the same; at least 2, or a step by -i")
    if args.first < 1:
        args.fail("-b 0: the smallest message has a byte or more")
    if args.last is not None and args.last < args.first:
        args.fail(f"-e {args.last} is below -b {args.first}: no size is left")
    if args.op == "fused" and not any("float" in dtype for dtype in args.dtypes):
        args.fail(f"-d {','.join(args.dtypes)}: a norm takes a floating dtype")
    if args.read is None and (os.environ["WORLD_SIZE"] if under_torchrun() else str(args.nproc)) == "1":
        args.fail("an all-reduce takes two ranks or more")
    _refuse_files(args)


def _refuse_files(args: argparse.Namespace) -> None:
    """The same for what is to be written, which happens only when everything was measured."""
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        args.fail("--plot takes matplotlib: pip install 'comm-bench[plot]'")
    for path in (args.plot, None if args.json in {None, "-"} else pathlib.Path(args.json)):
        if path is not None and not path.absolute().parent.is_dir():
            args.fail(f"there is no folder {path.absolute().parent} to write {path.name} to")
        if path is not None and path.is_dir():
            args.fail(f"{path} is a folder, and a file is to be written")
    if args.plot is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        known = FigureCanvasBase.get_supported_filetypes()
        if args.plot.suffix.removeprefix(".") not in known:
            args.fail(f"--plot {args.plot}: nothing is drawn in that format; known are {', '.join(sorted(known))}")


def _measure(args: argparse.Namespace, *, speaks: bool) -> int:
    from comm_bench.measure import Procedure
    from comm_bench.session import measure_all

    procedure = Procedure(args.calls, max(args.graph or 1, 1), args.warmup, args.repetitions, bool(args.checks))
    told = Listener() if not speaks else _Teller(tables=args.json != "-")
    document, rows = measure_all(
        functools.partial(_cases, args), ["comm-core", *args.arguments], procedure, args.backends, told
    )
    if speaks:
        _say(args, footer(document))
        _write(args, document, rows)
    return 1 if document["wrong"] else 0


def _cases(args: argparse.Namespace, device_type: str) -> list[BenchCase]:
    """What is to be measured, in the order of the tables."""
    if args.graph and device_type != "cuda":
        raise ValueError(_NO_GRAPHS.format(args.graph))
    both = ("eager", "graph") if device_type == "cuda" else ("eager",)
    modes = both if args.graph is None else ("graph",) if args.graph else ("eager",)
    places = PLACES if args.place == "both" else (args.place,)
    last = args.last or parse_nbytes(_LARGEST[device_type])
    sweep = list(sizes(args.first, last, args.factor, args.increment))
    return [
        BenchCase(op, mode, place, dtype, device_type, shape)
        for op, mode, place, dtype in itertools.product(_OPS[args.op], modes, places, args.dtypes)
        if op == "all_reduce" or "float" in dtype
        for shape in shapes(op, dtype, sweep, args.tokens, args.hidden)
    ]


def _read(args: argparse.Namespace) -> int:
    """Show a recorded run."""
    try:
        document = json.loads(args.read.read_text())
        rows = read_rows(document)
        text = [*preamble(document), *tables(rows), *footer(document)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        print(f"comm-core bench: {args.read} can't be read: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    _say(args, text)
    _write(args, document, rows)
    return 1 if document["wrong"] else 0


def _say(args: argparse.Namespace, lines: Iterable[str]) -> None:
    if args.json != "-":
        print(*lines, sep="\n", flush=True)


def _write(args: argparse.Namespace, document: dict[str, Any], rows: Sequence[Row]) -> None:
    """The JSON and the picture, where they are wanted."""
    text = json.dumps(document, indent=1)
    if args.json == "-":
        print(text, flush=True)
    elif args.json is not None:
        pathlib.Path(args.json).write_text(text + "\n")
    if args.plot is not None:
        from comm_bench.plot import draw

        draw(rows, args.plot, heading(document))


class _Teller(Listener):
    """Prints rows as they come; how far it is on a terminal's stderr."""

    def __init__(self, *, tables: bool) -> None:
        self._tables = tables
        self._table = ""

    def begins(self, document: dict[str, Any]) -> None:
        if self._tables:
            print(*preamble(document), sep="\n", flush=True)

    def measures(self, number: int, count: int, case: BenchCase) -> None:
        table = title(case.op, case.mode, case.place)
        self._progress(f"{number}/{count}  {table}, {case.dtype}, {case.nbytes} B")
        self._table, above = table, self._table
        if self._tables and table != above:
            self._progress("")
            print("", f"# {table}", header(), sep="\n", flush=True)

    def measured(self, rows: Sequence[Row]) -> None:
        self._progress("")
        if self._tables:
            print(*map(line, rows), sep="\n", flush=True)

    def drops(self, name: str, where: str, reason: str) -> None:
        self._progress("")
        print(f"{name} drops out of {where}: {reason}", file=sys.stderr)

    def _progress(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _converted(convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """A converter for argparse whose errors tell what was wrong."""

    def checked(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} isn't {what}: {error}") from error

    return checked


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("at least 1 is needed")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError("at least 0 is needed")
    return number


def _dtypes(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(DTYPES)
    names = tuple(dict.fromkeys(ALIASES.get(name, name) for name in text.split(",")))
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise ValueError(f"known are all, {', '.join((*ALIASES, *DTYPES))}")
    return names
