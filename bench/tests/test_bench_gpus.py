"""The benchmark on two GPUs: both modes, limits, spacers; and a backend that doesn't wait for its input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from bench_faults import FUSED, PLAIN, QUANTISED, Honest, Session, name_of, plant
from bench_ranks import by_case, measured_with, schema, wrong_by
from comm_bench.cases import bus_factor
from comm_bench.results import HOP, LAUNCH
from comm_core.types import TERMINAL

if TYPE_CHECKING:
    from harness import Ranks

pytestmark = pytest.mark.gpus(2)
OPS = (PLAIN, FUSED, QUANTISED[1])
GPUS = "cpu:gloo,cuda:nccl"
LIMITS = {LAUNCH, HOP, "limit:push", "limit:pull", "limit:copy"}
# A size that admission doesn't test. Copies of it keep a GPU busy for longer than the launch of a call: about 20 us
# each on an H100.
LARGE_NBYTES = 32 << 20


class OnGpus(Honest):
    """Sums with NCCL."""

    dtypes = ("bfloat16",)
    max_nbytes = 48 << 20
    side = False

    def ranges(self) -> tuple[comm.Range, ...]:
        return (comm.Range("all_reduce", dtypes=self.dtypes, device_types=("cuda",), max_nbytes=self.max_nbytes),)

    @comm.hookimpl
    def all_reduce(self, session: Session, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        result = torch.empty_like(tensor) if out is None else out
        if not self.side or tensor.nbytes != LARGE_NBYTES:
            result.copy_(tensor)
            dist.all_reduce(result, group=session.group)
            return result
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # without waiting for the current stream
            total = tensor.clone()
            dist.all_reduce(total, group=session.group)
        torch.cuda.current_stream().wait_stream(side)
        total.record_stream(torch.cuda.current_stream())
        return result.copy_(total)


class SideStream(OnGpus):
    side = True


def test_rows_limits_and_no_wrong_element_in_both_modes(ranks: Ranks, tmp_path: Path) -> None:
    nbytes = (1024, 1 << 20)
    arguments: dict[str, Any] = {"ops": OPS, "modes": ("eager", "graph"), "nbytes": nbytes, "calls": 10}
    document, other = ranks.run(
        measured_with, arguments, backend=GPUS, path=[plant(tmp_path, [OnGpus])] * 2, deadline_s=280
    )
    assert document == other
    schema().validate(document)
    assert document["wrong"] == 0
    assert document["dropped"] == []
    assert not LIMITS & set(document["absent"]), document["absent"]
    assert document["machine"]["device_type"] == "cuda"
    assert len(document["machine"]["devices"]) == 2
    tables = {
        (op, mode, place, size)
        for op in OPS
        for mode in ("eager", "graph")
        for place in ("out", "in")
        for size in nbytes
    }
    for name in {TERMINAL, name_of(OnGpus), *LIMITS}:
        rows = [row for row in document["rows"] if row["name"] == name]
        assert {(row["op"], row["mode"], row["place"], row["nbytes"]) for row in rows} == tables, name
        assert len(rows) == len(tables)
        for row in rows:
            assert (row["wrong"] is None) == (name in LIMITS)
            if row["busbw"] is not None:
                assert row["busbw"] == pytest.approx(row["algbw"] * bus_factor(2))
    for row in document["rows"]:
        spaced = {TERMINAL: ("in",), "nccl_raw": ("in", "out")}.get(row["name"], ())
        expected = (row["op"], row["mode"]) == (PLAIN, "graph") and row["place"] in spaced
        assert (row["spacer_us"] > 0) == expected


def test_a_side_stream_that_doesnt_wait_for_the_input_is_counted_wrong(ranks: Ranks, tmp_path: Path) -> None:
    path = [plant(tmp_path, [SideStream, OnGpus])] * 2
    arguments = {"nbytes": (1 << 20, LARGE_NBYTES), "calls": 5}
    document, other = ranks.run(measured_with, arguments, backend=GPUS, path=path, deadline_s=280)
    assert document == other
    assert set(by_case(document, SideStream)) == set(by_case(document, OnGpus)) == set(by_case(document))
    faulty = {(place, size): size == LARGE_NBYTES for place in ("out", "in") for size in (1 << 20, LARGE_NBYTES)}
    assert wrong_by(document, SideStream) == faulty
    assert wrong_by(document, OnGpus) == dict.fromkeys(faulty, False)
