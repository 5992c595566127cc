"""Groups that ask for a quantised wire, on CPUs: who gets it, what stays as it is, and which errors it has."""

from __future__ import annotations

from pathlib import Path

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from harness import Ranks, install

#: A backend that sums bfloat16 up to 1 MiB, from 4 KiB on with the wire, but for the fault that the name tells.
PLUGIN = """
import torch, torch.distributed as dist
import comm_core as comm

FAULT = {fault!r}
FROM, CAP = 4 << 10, 1 << 20

def quantised(x):
    groups = torch.nn.functional.pad(x, (0, -x.numel() % 128)).view(-1, 128)
    scale = (groups.abs().nan_to_num(nan=0).amax(1, keepdim=True) / 448).clamp(min=1e-30)
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten()[: x.numel()]

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def is_available(self, topology):
        exact = comm.Range("all_reduce", dtypes=("bfloat16",), max_nbytes=CAP)
        return comm.Available(300, (exact, comm.Range("all_reduce", None, ("bfloat16",), None, FROM, CAP, wire="fp8")))

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        parts = [torch.empty_like(tensor) for _ in range(session.world_size)]
        dist.all_gather(parts, tensor, group=session.group)
        parts = [part.float().flatten() for part in parts]
        if session.wire and tensor.nbytes >= FROM:
            total = quantised(sum(map(quantised, parts)))
            if FAULT == "coarse":
                total *= 1.25
        else:
            total = sum(parts)
        total = total.to(tensor.dtype).view_as(tensor)
        return total if out is None else out.copy_(total)

plugin = Plugin()
"""
NUMELS = (1, 2047, 2048, 5000, 65537, 1 << 19, (1 << 19) + 1)  # 2,048 elements are 4 KiB, and 2^19 are 1 MiB


def terms(numel: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(numel)
    ranks = range(dist.get_world_size())
    return [torch.randn(numel, generator=generator).mul(3.0**rank).to(torch.bfloat16) for rank in ranks]


def sums(handle: comm.Backend) -> list[int]:
    """Check sums, and return the numbers of elements of those that are exact."""
    exact = []
    for numel in NUMELS:
        inputs = terms(numel)
        got = handle.all_reduce(inputs[dist.get_rank()])
        wide = torch.stack(inputs).double()
        largest = sum(term.abs().max() for term in inputs)
        bound = 0.14 * wide.abs().sum(0) + 2.0**-15 * largest
        assert ((got - wide.sum(0)).abs() <= bound).all(), numel
        gathered = [torch.empty_like(got) for _ in inputs]
        dist.all_gather(gathered, got)
        assert all(torch.equal(each, got) for each in gathered), numel
        if torch.equal(got, torch.stack(inputs).float().sum(0).to(got.dtype)):
            exact.append(numel)
    return exact


def ask() -> str:
    handle = comm.get_backend(wire="fp8")
    assert comm.get_backend(wire="fp8") is handle
    with pytest.raises(ValueError, match=r"has a handle with .*wire='fp8'"):
        comm.get_backend()
    assert handle.decision.wire == "fp8"
    assert sums(handle) == [1, 2047, (1 << 19) + 1]
    # All else as in other groups: other dtypes, and fused calls, which core composes here.
    single = torch.arange(4096.0)
    assert torch.equal(handle.all_reduce(single), single * 2)
    text = handle.explain()
    assert "  quantised 4 KiB to 1 MiB, fp8 wire; quantised up to 1 MiB; torch_distributed any size\n" in text
    quantised = {item.backend: (item.calls, item.nbytes) for item in handle.stats() if item.wire}
    assert quantised == {"quantised": (4, 2 * sum(NUMELS[2:-1]))}
    comm.close()
    handle = comm.get_backend()
    assert sums(handle) == list(NUMELS)
    assert "wire" not in handle.explain()
    comm.close()
    handle = comm.get_backend(backends=("torch_distributed",), wire="fp8")
    assert sums(handle) == list(NUMELS)
    assert ", fp8 wire, which no backend here has\n" in handle.explain()
    comm.close()
    for wrong in ({"wire": "fp4"}, {"wire": "fp8", "deterministic": True}):
        with pytest.raises(ValueError, match="wire"):
            comm.get_backend(**wrong)  # type: ignore[arg-type]
    return text.partition("\n")[0]


def test_large_sums_travel_by_the_wire_and_nothing_else_changes(ranks: Ranks, tmp_path: Path) -> None:
    path = [install(tmp_path / "quantised", "quantised", PLUGIN.format(fault=""))]
    for line in ranks.run(ask, path=[path] * 2, deadline_s=300):
        assert line.endswith(", fp8 wire")


def ask_the_wrong_one() -> str:
    handle = comm.get_backend(wire="fp8")
    assert sums(handle) == list(NUMELS)
    candidate = handle.decision.candidate("quantised")
    assert candidate is not None
    comm.close()
    exact = comm.get_backend().decision.candidate("quantised")
    assert exact is not None
    assert exact.verdict == "serves"
    comm.close()
    return candidate.reason


def test_sums_beyond_the_bound_are_found_before_they_are_served(ranks: Ranks, tmp_path: Path) -> None:
    path = [install(tmp_path / "quantised", "quantised", PLUGIN.format(fault="coarse"))]
    for reason in ranks.run(ask_the_wrong_one, path=[path] * 2, deadline_s=300):
        assert " sums beyond the error bound of the fp8 wire, the first at element " in reason


def differ() -> str:
    with pytest.raises(comm.NegotiationError) as caught:
        comm.get_backend(wire="fp8" if dist.get_rank() else None)
    return str(caught.value)


def test_ranks_that_ask_differently_raise(ranks: Ranks) -> None:
    for text in ranks.run(differ):
        assert "get_backend(wire=...) differs" in text


def read_environment() -> tuple[str, str]:
    found = []
    for wire in (None, ""):
        found.append(comm.get_backend(wire=wire).decision.wire)
        comm.close()
    with pytest.raises(comm.NegotiationError, match="COMM_CORE_DETERMINISTIC and COMM_CORE_WIRE"):
        comm.get_backend(deterministic=True)
    return found[0], found[1]


def test_the_variable_holds_where_the_argument_is_silent(ranks: Ranks) -> None:
    assert ranks.run(read_environment, env={"COMM_CORE_WIRE": "fp8"}) == [("fp8", "")] * 2
