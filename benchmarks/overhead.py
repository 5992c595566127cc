#!/usr/bin/env python3
"""Measure the costs of core itself: a call through the handle, the import, a decision among thousands of ranks.

    python benchmarks/overhead.py [--json]

It needs no GPU and no process group. The hooks are fakes, so only core's own work is measured. The times hold for the
machine that runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import comm_core
import torch
from comm_core._handle import operators
from comm_core._handle.backend import Backend
from comm_core._handle.serving import Serving
from comm_core._handle.session import Session
from comm_core._plan.checks import check_policies
from comm_core._plan.decide import Evidence, encode_answer, initial_slate, screen_candidates
from comm_core._plan.routes import Offer
from comm_core._plugins.discovery import Plugin
from comm_core._probe.rank import probe_rank
from comm_core.topology import Device, Host, Link, RankInfo, Topology
from comm_core.types import Available, Decision, Range, Unavailable

SCHEMA = 1
GPUS_PER_HOST = 8
#: The sizes of the groups, in ranks, for which decisions are computed.
WORLD_SIZES = (512, 4096)
#: The rounds of 2,000 calls in which a call is timed.
ROUNDS = 25
#: The least size of a rank's evidence, as JSON in bytes.
EVIDENCE_NBYTES = 2048


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the result.

    Attributes:
        name: the measured quantity.
        value: the figure.
        unit: the unit of `value`, `worst` and `target`.
        worst: the largest value of the repeats; None for a single measurement.
        target: the upper limit for `value`; None without a target.
    """

    name: str
    value: float
    unit: str
    worst: float | None = None
    target: float | None = None

    @property
    def missed(self) -> bool:
        """Return whether `value` is above its target."""
        return self.target is not None and self.value > self.target


def _require(truth: bool, why: str) -> None:
    if not truth:
        raise RuntimeError(why)


def passed_on(session: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001 - a hook
    """Return the input: a hook with no cost but the call."""
    return tensor


def fused_passed_on(
    session: object,  # noqa: ARG001 - a hook
    tensor: torch.Tensor,
    residual: torch.Tensor,
    *_rest: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs: a hook of the fused operation with no cost but the call."""
    return tensor, residual


def four_ranges() -> tuple[Range, ...]:
    """Return four ranges; an all-reduce of 64 KiB is in the last."""
    edges = (0, 4 << 10, 16 << 10, 32 << 10, 1 << 20)
    return tuple(
        Range("all_reduce", min_nbytes=low + 1, max_nbytes=high, multiple_nbytes=16)
        for low, high in itertools.pairwise(edges)
    )


def fake_handle() -> Backend:
    """Return a handle of one process, with a route of one backend's four ranges and the terminal fallback."""
    offer = Offer("fake", 300, (*four_ranges(), Range("all_reduce_add_rms_norm")))
    topology = Topology.of([probe_rank(0, torch.device("cpu"), plugins={}, facts={})])
    decision = initial_slate({"fake": "1"}, [{"fake": encode_answer(Available(300, offer.ranges))}]).decision(("cpu",))
    hooks = {"all_reduce": passed_on, "all_reduce_add_rms_norm": fused_passed_on}
    session = Session(Plugin("fake", None, None, hooks), None, cast("Any", None))
    terminal = (passed_on, None)
    return Backend(Serving(decision, topology, "the benchmark", torch.device("cpu"), terminal, {"fake": session}))


def hot_path(repeats: int) -> Iterator[Figure]:
    """Measure the time that the handle adds to a direct call of the hook."""
    backend = fake_handle()
    rules = backend.decision.route("all_reduce", "eager", "cpu", "bfloat16").rules
    _require(len(rules) == 5, f"expected four ranges and the terminal fallback; got {rules}")
    tensor = torch.zeros(32 << 10, dtype=torch.bfloat16)
    for label, out, target in (
        ("out of place", None, 0.8),
        ("in place", tensor, None),
        ("into another tensor", torch.empty_like(tensor), None),
    ):
        direct = functools.partial(_median_us, passed_on, None, tensor, out)
        through = functools.partial(_median_us, backend.all_reduce, tensor, out)
        yield _added(f"handle's share of a call, {label}", direct, through, repeats, target)


def fused_path(repeats: int) -> Iterator[Figure]:
    """Measure the time that the handle adds to a direct call of the fused hook."""
    backend = fake_handle()
    x, residual = (torch.zeros((8, 4096), dtype=torch.bfloat16) for _ in range(2))
    weight = torch.zeros(4096, dtype=torch.bfloat16)
    for label, residual_out in (("out of place", None), ("in place", residual)):
        call = functools.partial(backend.all_reduce_add_rms_norm, x, residual, weight, residual_out=residual_out)
        arguments = (None, x, residual, weight, 1e-6, 0.0, None, residual_out)
        direct = functools.partial(_median_us, fused_passed_on, *arguments)
        through = functools.partial(_median_us, call)
        yield _added(f"handle's share of a fused call, {label}", direct, through, repeats)


def operator(repeats: int) -> Iterator[Figure]:
    """Measure the time that an eager call of `torch.ops.comm_core` adds to a call through the handle."""
    backend = fake_handle()
    operators.register(("the benchmark",), backend)
    tensor = torch.zeros(32 << 10, dtype=torch.bfloat16)
    for label, call, out in (
        ("out of place", torch.ops.comm_core.all_reduce, None),
        ("in place", torch.ops.comm_core.all_reduce_, tensor),
    ):
        handle = functools.partial(_median_us, backend.all_reduce, tensor, out)
        through = functools.partial(_median_us, call, tensor, "the benchmark")
        yield _added(f"operator over handle, {label}", handle, through, repeats)
    operators.unregister(backend)


def _added(
    name: str, direct: Callable[[], float], through: Callable[[], float], repeats: int, target: float | None = None
) -> Figure:
    """Return the difference of two ways' smallest medians over interleaved rounds, in microseconds."""
    rounds = [(direct(), through()) for _ in range(repeats)]
    smallest_direct, smallest_through = (min(medians) for medians in zip(*rounds, strict=True))
    worst = max(other - one for one, other in rounds)
    return Figure(name, smallest_through - smallest_direct, "us", worst=worst, target=target)


def _median_us(call: Callable[..., object], *arguments: object) -> float:
    """Return microseconds per call, as the median of `ROUNDS` rounds of 2,000 calls."""
    variables = {f"_{number}": argument for number, argument in enumerate(arguments)} | {"call": call}
    statement = f"call({', '.join(f'_{number}' for number in range(len(arguments)))})"
    return statistics.median(timeit.repeat(statement, globals=variables, repeat=ROUNDS, number=2000)) / 2000 * 1e6


_IMPORT = """
import time
import torch
before = time.perf_counter()
import comm_core
took = time.perf_counter() - before
assert not torch.cuda.is_initialized(), "the import started CUDA"
print(took)
"""


def import_time(repeats: int) -> Iterator[Figure]:
    """Measure `import comm_core` after `import torch` in new interpreters; any side effect is an error."""
    took_ms = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            # The script prints one number; `float` below fails if the import prints too.
            result = subprocess.run(  # noqa: S603 - this interpreter and the text above
                [sys.executable, "-c", _IMPORT],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(Path(comm_core.__file__).parents[1])},
                check=True,
                capture_output=True,
                text=True,
                timeout=300,
            )
            made = list(Path(folder).iterdir())
        _require(not made, f"the import created {made}")
        _require(not result.stderr, result.stderr)
        took_ms.append(float(result.stdout) * 1e3)
    yield Figure("import comm_core after torch", statistics.median(took_ms), "ms", worst=max(took_ms), target=30.0)


def evidence_of(rank: int) -> dict[str, Any]:
    """Return a rank's evidence as JSON, as on hosts with eight GPUs connected by NVSwitch."""
    host, gpu = divmod(rank, GPUS_PER_HOST)
    boot_id = f"{host:08x}-269e-4d37-b2a7-4de452e6b438"
    uuids = [f"GPU-{host:08x}-128b-4f33-8c5c-7fd0a6a3a45{number}" for number in range(GPUS_PER_HOST)]
    names = ("customar_v1", "customar_v2", "flashinfer_fusion", "nccl", "shm")
    info = RankInfo(
        global_rank=rank,
        host=Host(f"node-{host:04}", f"{boot_id} ipc 4:4026532289 shm 131:1", boot_id, 68719476736),
        device=Device(
            type="cuda",
            uuid=uuids[gpu],
            name="NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            memory_nbytes=85017755648,
            links={uuid: Link(18, True) for uuid in uuids if uuid != uuids[gpu]},
        ),
        allocator="native",
        versions={
            "comm_core": "0.1.0",
            "python": "3.12.8",
            "torch": "2.13.0+cu130",
            "cuda": "13.0",
            "nccl": "2.29.7",
            "driver": "580.95.05",
        },
        plugins=dict.fromkeys(names, "0.1.0"),
        facts={name: {"compiler": "/usr/local/cuda/bin/nvcc", "built": False} for name in names[:3]},
    )
    policy: dict[str, Any] = {
        "get_backend(backends=...)": None,
        "get_backend(timeout_s=...)": None,
        "COMM_CORE_BACKENDS": None,
        "COMM_CORE_DISABLE": [],
        "COMM_CORE_CONTROL_TIMEOUT_S": 300.0,
        "COMM_CORE_CONNECT_TIMEOUT_S": 600.0,
        "COMM_CORE_WAIT_TIMEOUT_S": 300.0,
        "COMM_CORE_IMPORT_TIMEOUT_S": 60.0,
        "COMM_CORE_MEMORY_BUDGET_NBYTES": 1 << 30,
        "the process group's backend": "cpu:gloo,cuda:nccl",
        "the kind of device": "cuda",
    }
    data = Evidence(info, policy).to_json()
    # Stands for the plugins' facts, and fills the evidence up to its least size.
    data["info"]["facts"]["nccl"] = {"notes": "x" * max(EVIDENCE_NBYTES - len(json.dumps(data)), 0)}
    return data


def answers_of(rank: int) -> dict[str, Any]:
    """Return five plugins' answers on one rank; they differ between ranks."""
    limit = (8 << 20) - 4096 * (rank % 3)
    return {
        "customar_v1": encode_answer(
            Available(200, (Range("all_reduce", None, ("float16", "bfloat16"), None, 0, limit),))
        ),
        "customar_v2": encode_answer(Unavailable("the group spans hosts")),
        "flashinfer_fusion": encode_answer(
            Available(300, (Range("all_reduce_add_rms_norm", None, ("float16", "bfloat16"), max_tokens=2048),))
        ),
        "nccl": encode_answer(Available(100, (Range("all_reduce", device_types=("cuda",)),))),
        "shm": encode_answer(Unavailable("tensors live on cuda")),
    }


def decide(evidence: list[dict[str, Any]], answers: list[dict[str, Any]]) -> Decision:
    """Compute a decision as a rank does between the exchanges."""
    parsed = [Evidence.from_json(item) for item in evidence]
    check_policies(parsed, str)
    asked, dropped = screen_candidates(parsed, None, (), "COMM_CORE_BACKENDS")
    return initial_slate(asked, answers, dropped).decision(("cuda", "cpu"))


def deciding(repeats: int) -> Iterator[Figure]:
    """Measure the time and the memory of a decision in groups of `WORLD_SIZES` ranks."""
    medians = {}
    for world_size in WORLD_SIZES:
        evidence = [evidence_of(rank) for rank in range(world_size)]
        _require(all(len(json.dumps(item)) >= EVIDENCE_NBYTES for item in evidence), "the evidence is too small")
        answers = [answers_of(rank) for rank in range(world_size)]
        _require(decide(evidence, answers) == decide(evidence, answers), "the same evidence gave two decisions")
        took_s = []
        for _ in range(repeats):
            gc.collect()
            before = time.perf_counter()
            decide(evidence, answers)
            took_s.append(time.perf_counter() - before)
        medians[world_size] = statistics.median(took_s)
        target = 0.5 if world_size == 4096 else None
        yield Figure(f"decide, {world_size} ranks", medians[world_size], "s", worst=max(took_s), target=target)
    small, large = WORLD_SIZES
    yield Figure(f"decide, {large} ranks over {small}", medians[large] / medians[small], "times")
    peak = _memory_nbytes(lambda: decide(evidence, answers))[1]
    yield Figure(f"decide, {large} ranks, memory beside the evidence", peak / (1 << 20), "MiB")


def handle_memory() -> Iterator[Figure]:
    """Measure a handle's Python memory, without the plugins' buffers."""
    fake_handle()
    yield Figure("a handle's memory", _memory_nbytes(fake_handle)[0] / 1024, "KiB")


def _memory_nbytes(call: Callable[[], object]) -> tuple[int, int]:
    """Return the Python memory of a call's result, and the peak during the call."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = call()
        gc.collect()
        figures = tracemalloc.get_traced_memory()
        del kept
        return figures
    finally:
        tracemalloc.stop()


def table(figures: list[Figure]) -> str:
    """Format the figures as a table."""
    rows = [("what", "value", "worst", "target", "")]
    rows += [
        (
            figure.name,
            f"{figure.value:.3g} {figure.unit}",
            "" if figure.worst is None else f"{figure.worst:.3g} {figure.unit}",
            "" if figure.target is None else f"{figure.target:g} {figure.unit}",
            "missed" if figure.missed else "",
        )
        for figure in figures
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> int:
    """Measure and print; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of each measurement (default 5)")
    options = parser.parse_args()
    figures = [
        *hot_path(options.repeats),
        *fused_path(options.repeats),
        *operator(options.repeats),
        *import_time(options.repeats),
        *deciding(options.repeats),
        *handle_memory(),
    ]
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    if options.json:
        data = {
            "schema": SCHEMA,
            "machine": machine,
            "figures": [{**dataclasses.asdict(figure), "missed": figure.missed} for figure in figures],
        }
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        sys.stdout.write(f"{table(figures)}\n({machine})\n")
    return 1 if any(figure.missed for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
