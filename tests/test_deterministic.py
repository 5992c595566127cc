"""Deterministic groups on CPUs: a result's bits depend on the inputs alone."""

from __future__ import annotations

import re
from pathlib import Path

import comm_core as comm
import pytest
import torch
from harness import Ranks, install
from order_ranks import PLUGIN, QUANT, deterministic, quantising, sweep_fused, sweep_plain, sweep_quant

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HIDDEN = 64
GATHER_NBYTES = 96 << 10
# Numbers of rows of 64 elements, from 128 to 512 bytes: the edges of shm's two algorithms and of its chunks of 512 KiB,
# of what core gathers, and of the plugin's 64 KiB.
COUNTS = {
    "shm": (1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 129, 256, 257, 1000, 1024, 1025, 2048, 4096, 4097),
    "torch_distributed": (1, 2, 3, 7, 33, 128, 191, 192, 193, 384, 385, 768, 769, 1000),
    "capped": (1, 2, 3, 7, 8, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1100),
}
MODES = ("eager", "capture")


def sweep(names: tuple[str, ...], owner: str) -> str:
    counts = COUNTS[owner]
    with deterministic(names, GATHER_NBYTES) as handle:
        assert handle.name == owner
        done = sweep_plain(handle, counts, HIDDEN, FLOATS, MODES[:1])
        done += sweep_plain(handle, counts[1:-1:3], HIDDEN, FLOATS, MODES[1:])
        assert done == (len(counts) + len(counts[1:-1:3])) * len(FLOATS)
        assert sweep_fused(handle, counts, HIDDEN, FLOATS, MODES[:1])
        for hidden_size, some in ((HIDDEN, counts[1:-1:4]), (35, counts[:-1:4]), (40000, (1, 3))):
            assert sweep_fused(handle, some, hidden_size, FLOATS, MODES)
        comm.pre_capture_init(max_tokens=64, hidden_size=HIDDEN, dtype=torch.bfloat16)
        assert sweep_fused(handle, counts[:-1:5], HIDDEN, FLOATS, MODES)
        owners = sweep_quant(handle, counts[::3], HIDDEN, FLOATS[:3], MODES[:1])
        # The plugin doesn't norm rows of 36 elements. Rows of 128 have the form with groups.
        for hidden_size, some in ((HIDDEN, counts[::8]), (36, counts[:-1:8]), (128, counts[:-1:8]), (40000, (1, 3))):
            owners += sweep_quant(handle, some, hidden_size, FLOATS[2:3], MODES)
        assert owners == quantising(handle)
        assert set(owners) == {"torch_distributed", *(["capped"] if owner == "capped" else [])}
        with pytest.raises(TypeError, match="has no sum in rank order"):
            handle.all_reduce(torch.zeros(8).to(torch.float8_e4m3fn))
        integers = torch.arange(1000)
        assert torch.equal(handle.all_reduce(integers), integers * handle.topology.world_size)
        return handle.explain().partition("\nwaited for")[0]  # the waits differ between ranks


# Two numbers have the same sum in either order: a group of two shows nothing.
@pytest.mark.parametrize(("owner", "world_size"), [("shm", 4), ("torch_distributed", 3), ("capped", 3)])
def test_bits_depend_on_the_inputs_alone(ranks: Ranks, tmp_path: Path, owner: str, world_size: int) -> None:
    path = [
        install(tmp_path / "capped", "capped", PLUGIN.format(fault="")),
        install(tmp_path / "shm", "shm", "import comm_plugin_shm as plugin\n"),
    ]
    found = ranks.run(sweep, (owner,), owner, world_size=world_size, path=[path] * world_size, deadline_s=500)
    assert len(set(found)) == 1
    if owner == "capped":
        assert "capped up to 64 KiB; capped in pieces of up to 64 KiB; torch_distributed" in found[0]
        assert "capped up to 16 KiB, hidden size a multiple of 8; torch_distributed any size" in found[0]


def refuse(fault: str) -> tuple[str, str, str]:
    """Return who sums bfloat16 in a deterministic group, what it says of the plugin, and who sums it in another."""
    with deterministic(None) as handle:
        assert sweep_plain(handle, (1, 40), HIDDEN, (torch.bfloat16,), MODES)
        assert sweep_fused(handle, (1, 99, 100, 101, 200), HIDDEN, (torch.bfloat16,), MODES)
        name = handle.decision.route("all_reduce", "eager", "cpu", "bfloat16").backend_for(128)
        candidate = handle.decision.candidate("capped")
        assert candidate is not None
        route = handle.decision.route("all_reduce_add_rms_norm", "eager", "cpu", "bfloat16")
        if fault == "few tokens":
            assert route.backend_for(128, 1, 64) == "torch_distributed"
        owners = sweep_quant(handle, (1, 99, 100, 101, 200), HIDDEN, (torch.bfloat16,), MODES)
        assert owners == quantising(handle)
        assert set(owners) == {"torch_distributed"}
        if fault == "other norm":
            assert route.backend_for(128, 1, 64) == "capped"
            assert f"the admission test of {QUANT} failed" in candidate.reason
        with pytest.raises(ValueError, match=r"has a handle with .*deterministic=True"):
            comm.get_backend()
    if candidate.verdict != "serves":
        with pytest.raises(comm.BackendUnavailableError, match=re.escape(candidate.reason)):
            comm.get_backend(backends=("capped",), deterministic=True)
    free = comm.get_backend().decision.route("all_reduce", "eager", "cpu", "bfloat16").backend_for(128)
    comm.close()
    return name, candidate.reason, free


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            "unspecified",
            "the group is deterministic, which takes rank_order_fp32; the numerics of capped are unspecified",
        ),
        ("reversed", "wrong sums, the first at element"),
        ("narrow", "available, except for eager float16, eager bfloat16: the admission test"),
        ("few tokens", "available on every rank"),
        ("other norm", "the norms of 1 rows haven't the bits of all_reduce_add_rms_norm"),
    ],
)
def test_a_backend_that_sums_otherwise_is_left_out(ranks: Ranks, tmp_path: Path, fault: str, reason: str) -> None:
    path = [install(tmp_path / "capped", "capped", PLUGIN.format(fault=fault))]
    for name, why, free in ranks.run(refuse, fault, world_size=3, path=[path] * 3, deadline_s=300):
        assert name == ("capped" if fault in ("few tokens", "other norm") else "torch_distributed")
        assert reason in why
        assert free == "capped"  # sums of integers are exact in any order


def ask_differently(values: tuple[bool | None, ...]) -> str:
    import torch.distributed as dist

    try:
        comm.get_backend(deterministic=values[dist.get_rank()])
    except comm.NegotiationError as error:
        return str(error)
    return "agreed"


def test_ranks_that_ask_differently_raise(ranks: Ranks) -> None:
    for text in ranks.run(ask_differently, (True, None)):
        assert "get_backend(deterministic=...)" in text


def read_environment() -> tuple[bool, bool]:
    handle = comm.get_backend()
    by_variable = handle.decision.deterministic
    comm.close()
    handle = comm.get_backend(deterministic=False)
    by_argument = handle.decision.deterministic
    comm.close()
    return by_variable, by_argument


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_variable_holds_where_the_argument_is_silent(ranks: Ranks, world_size: int) -> None:
    env = {"COMM_CORE_DETERMINISTIC": "1"}
    assert ranks.run(read_environment, world_size=world_size, env=env) == [(True, False)] * world_size
