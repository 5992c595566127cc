"""A job of torchrun for the programs beside this file: join it, time on its slowest rank, describe and leave it."""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import comm_core as comm
import torch
import torch.distributed as dist

Key = TypeVar("Key")
# The rounds that don't count.
WARMUP = 3


def join(parser: argparse.ArgumentParser) -> torch.device:
    """Join the job, and return this rank's device: its GPU, or the CPU if there are fewer GPUs than ranks."""
    if "LOCAL_RANK" not in os.environ:
        parser.error(f"this isn't a torchrun job: start torchrun --nproc-per-node N benchmarks/{parser.prog}")
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def leave() -> None:
    """Close the handles and leave the job. Collective."""
    gc.collect()  # graphs must be destroyed before the groups that their calls use
    comm.close()
    dist.destroy_process_group()


def describe(topology: comm.Topology) -> dict[str, Any]:
    """Return the first fields of a record: what ran, when, and on what."""
    program, ranks = Path(sys.argv[0]).stem, topology.ranks
    command = [f"torchrun --nproc-per-node {len(ranks)} benchmarks/{program}.py", *sys.argv[1:]]
    return {
        "schema": 1,
        "program": program,
        "started": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "machine": {"ranks": len(ranks), "devices": [info.device.name for info in ranks if info.device]}
        | {"versions": dict(ranks[0].versions), "plugins": dict(ranks[0].plugins)},
    }


def replay_of(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Make the calls, capture them and return their graph's replay; without a GPU, return `call`. Collective."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        call()
    graph.calls = call  # type: ignore[attr-defined]  # whose tensors it uses
    return graph.replay


def max_over_ranks(number: float) -> float:
    """Return the largest of the ranks' numbers. Collective; it runs on CPUs, so it is also a barrier between hosts."""
    tensor = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def time_us(run: Callable[[], object], replays: int, *, on_gpu: bool) -> float:
    """Return microseconds per run on the slowest rank, as the mean of `replays` after an untimed one. Collective."""
    max_over_ranks(0)
    run()
    if on_gpu:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
    begin = time.perf_counter()
    for _ in range(replays):
        run()
    seconds = time.perf_counter() - begin
    if on_gpu:
        last.record()
        last.synchronize()
        seconds = first.elapsed_time(last) / 1e3
    return max_over_ranks(seconds) / replays * 1e6


def medians_us(
    runs: Mapping[Key, Callable[[], object]],
    options: argparse.Namespace,
    *,
    on_gpu: bool,
    before: Callable[[Key], object] = lambda _: None,
) -> dict[Key, float]:
    """Time runs in turns, and return the medians over the rounds in microseconds. Collective.

    Args:
        runs: by key, the functions to time.
        options: the command's, with `rounds` and `replays`.
        on_gpu: as in `time_us`.
        before: called with the key before each run is timed.
    """
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for number, (key, run) in itertools.product(range(options.rounds + WARMUP), runs.items()):
        before(key)
        us = time_us(run, options.replays, on_gpu=on_gpu)
        if number >= WARMUP:
            times[key].append(us)
    return {key: statistics.median(each) for key, each in times.items()}


def write(document: dict[str, Any], path: Path | None) -> None:
    """Print the rows of a record on rank 0, and write the record to `path`, if there is one."""
    if dist.get_rank() == 0:
        sys.stdout.writelines(f"{json.dumps(row)}\n" for row in document["rows"])
        if path:
            path.write_text(json.dumps(document, indent=1) + "\n")
