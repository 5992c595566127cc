"""What a session does on the host, against a fake of the native code."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import comm_core as comm
import comm_plugin_customar_v2 as customar_v2
import pytest
import torch
from comm_core import fallback, kernel_session, memory
from comm_core.tuning import VariantChoice
from comm_core.types import QUANTS
from comm_plugin_customar_v2 import norm_policy, policy, session, shapes


class Native:
    """Takes what the module takes, and notes it."""

    def __init__(self, algorithms: int = len(policy.ALGORITHMS | policy.WIRE_ALGORITHMS)) -> None:
        self.algorithms = [algorithms, len(norm_policy.ALGORITHMS)]
        self.calls: list[Any] = []
        self.missing = 0
        self.has_padded = True
        self.refuses_norm_shapes = False
        self.hot_path: dict[str, Any] = {}

    def constants(self) -> list[int]:
        return self.algorithms

    def padded(self, address: int) -> dict[str, Any] | None:
        self.calls.append(("padded", address))
        return self.hot_path if self.has_padded else None

    def connect(self, *arguments: Any) -> dict[str, Any]:
        self.calls.append(("connect", *arguments))

        def all_reduce_out(tensor: torch.Tensor, out: torch.Tensor) -> None:
            if self.missing:
                raise RuntimeError("a kernel timed out")
            out.copy_(tensor * 2)

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            all_reduce_out(tensor, out := torch.empty_like(tensor))
            return out

        def all_reduce_add_rms_norm_out(
            tensor: torch.Tensor,
            residual: torch.Tensor,
            weight: torch.Tensor,
            out: torch.Tensor,
            residual_out: torch.Tensor,
            eps: float,
            weight_offset: float,
        ) -> bool:
            if self.missing:
                raise RuntimeError("a kernel timed out")
            if not tensor.is_contiguous():
                return False
            assert not weight.requires_grad
            fallback.add_rms_norm(tensor * 2, residual, weight, eps, weight_offset, out, residual_out)
            return True

        def all_reduce_add_rms_norm_quant(
            tensor: torch.Tensor,
            residual: torch.Tensor,
            weight: torch.Tensor,
            values: torch.Tensor,
            scale: torch.Tensor,
            total: torch.Tensor,
            norm: torch.Tensor,
            wants_norm: bool,
            eps: float,
            weight_offset: float,
            form: int,
        ) -> bool:
            if self.missing:
                raise RuntimeError("a kernel timed out")
            if tensor.shape[1] > 16384:
                return False
            target = norm if wants_norm else None
            normed, _ = fallback.add_rms_norm(tensor * 2, residual, weight, eps, weight_offset, target, total)
            assert values.dtype is torch.uint8
            fallback.quantize(normed, QUANTS[form], scale, values.view(torch.float8_e4m3fn))
            return True

        self.hot_path = {
            "all_reduce": all_reduce,
            "all_reduce_add_rms_norm_quant": all_reduce_add_rms_norm_quant,
            "all_reduce_out": all_reduce_out,
            "all_reduce_add_rms_norm_out": all_reduce_add_rms_norm_out,
        }
        return {
            **self.hot_path,
            "padded": self.padded,
            "set_shapes": lambda numbers: self.calls.append(("shapes", numbers)),
            "set_wire_shapes": lambda *numbers: self.calls.append(("wire shapes", *numbers)),
            "set_norm_shapes": self.set_norm_shapes,
            "error": lambda: self.missing,
            "waits": lambda: [0, 0, 0, 3, 4500, 2500],
            "algorithm_of": lambda _: 2,
            "abort": lambda: self.calls.append("abort"),
            "attach": lambda addresses, count: self.calls.append(("attach", addresses, count)),
        }

    def set_norm_shapes(self, numbers: list[int]) -> None:
        if self.refuses_norm_shapes:
            raise ValueError("row 0 can't be launched")
        self.calls.append(("norm shapes", numbers))


class FakeBuffer:
    """A buffer of this process alone."""

    def __init__(self, nbytes: int, initialize: Any, fabric: bool) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8)
        initialize(self.tensor)
        self.nbytes, self.fabric = nbytes, fabric
        self.addresses = (self.tensor.data_ptr(), 4096)
        self.calls: list[str] = []

    def suspend(self) -> None:
        self.calls.append("suspend")

    def resume(self) -> None:
        self.calls.append("resume")

    def close(self) -> None:
        self.calls.append("close")


TOPOLOGY = comm.Topology(
    tuple(
        comm.RankInfo(
            rank,
            comm.Host("node", "id", "boot"),
            comm.Device("cuda", f"GPU-{rank}", capability=(9, 0)),
            facts={"customar_v2": {"missing": None, "forced": None}},
        )
        for rank in range(2)
    ),
    ("cuda",),
)


def connect(native: Native, context: comm.GroupContext) -> session.Session:
    return session.connect(native, TOPOLOGY, context)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> comm.GroupContext:
    steps: list[str] = []

    def all_gather(value: Any) -> list[Any]:
        steps.append("gather")
        return [value, 114]

    control = SimpleNamespace(barrier=lambda: steps.append("barrier"), all_gather=all_gather, steps=steps)

    def share(nbytes: int, context: comm.GroupContext, initialize: Any, *, fabric: bool) -> FakeBuffer:
        steps.append("share")
        return FakeBuffer(nbytes, initialize, fabric)

    monkeypatch.setattr(memory, "share", share)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    group: Any = object()
    return comm.GroupContext(group, 0, 2, torch.device("cpu"), (4, 7), control, 256 << 20, 3.0)  # type: ignore[arg-type]


def test_connect_empties_the_cells(context: comm.GroupContext) -> None:
    native = Native()
    own = connect(native, context)
    assert context.control.steps == ["gather", "share"]  # type: ignore[attr-defined]
    (name, rank, world_size, layout, timeout_s, _), (_, shapes), (_, norm_shapes), attached = native.calls
    assert (name, rank, world_size, timeout_s, len(layout)) == ("connect", 0, 2, 3.0, 3)
    assert shapes == policy.flat(policy.rows_for(9, 2))
    assert norm_shapes == norm_policy.flat(norm_policy.rows_for(9, 2))
    buffer = own.buffer
    assert not buffer.fabric  # type: ignore[attr-defined]
    # The fewest multiprocessors of all ranks.
    assert attached == ("attach", [buffer.tensor.data_ptr(), 4096], 114)
    assert own.memory_nbytes == buffer.tensor.nbytes
    tails_at = layout[0]
    assert (buffer.tensor[tails_at:] == 0xFF).all()
    assert buffer.tensor[:8].view(torch.int64).item() == 1 << 20
    assert not buffer.tensor[8:tails_at].any()


def test_a_group_with_the_wire_has_a_table_for_it(context: comm.GroupContext) -> None:
    native = Native()
    own = connect(native, dataclasses.replace(context, wire="fp8"))
    table = policy.flat(policy.wire_rows_for(9, 2))
    assert ("wire shapes", policy.WIRE_FROM_NBYTES, table) in native.calls
    own.set_wire_rows([policy.Row(16, "oneshot_push_fp8", 1, 64, 8)])
    assert native.calls[-1] == ("wire shapes", policy.WIRE_FROM_NBYTES, [16, 4, 1, 64, 8, 0])
    plain = Native()
    assert connect(plain, context).memory_nbytes <= own.memory_nbytes
    assert not any(call[0] == "wire shapes" for call in plain.calls)


def test_native_code_of_another_version_is_refused_before_the_exchange(context: comm.GroupContext) -> None:
    with pytest.raises(RuntimeError, match="another version"):
        connect(Native(3), context)
    assert context.control.steps == []  # type: ignore[attr-defined]


def test_the_hot_path(context: comm.GroupContext) -> None:
    own = connect(Native(), context)
    x = torch.ones(8)
    assert torch.equal(customar_v2.all_reduce(own, x, None), x * 2)
    assert customar_v2.all_reduce(own, x, x) is x
    assert torch.equal(x, torch.full((8,), 2.0))
    assert own.algorithm_of(16) == "twoshot_push"


def test_chosen_variants_reach_the_native_code_and_leave_it(context: comm.GroupContext) -> None:
    native = Native()
    own = connect(native, context)
    before = customar_v2.variants(own, "all_reduce", 1 << 20, 0)
    text = "twoshot_push:vecs=1,threads=64,blocks=264,pipeline_depth=0"
    assert text in before[1:]
    customar_v2.use_variants(own, (VariantChoice("all_reduce", text),))
    assert customar_v2.variants(own, "all_reduce", 1 << 20, 0)[0] == text
    tables = shapes.with_choices(shapes.tables_for(9, 2), [VariantChoice("all_reduce", text)])
    assert native.calls[-2:] == [
        ("shapes", policy.flat(tables.rows)),
        ("norm shapes", norm_policy.flat(norm_policy.rows_for(9, 2))),
    ]
    known = len(native.calls)
    with pytest.raises(ValueError, match="'ring' isn't one of"):
        customar_v2.use_variants(own, (VariantChoice("all_reduce", "ring"),))
    assert len(native.calls) == known
    native.refuses_norm_shapes = True
    with pytest.raises(ValueError, match="can't be launched"):
        customar_v2.use_variants(own, ())
    native.refuses_norm_shapes = False
    assert native.calls[-1] == ("shapes", policy.flat(tables.rows))
    assert customar_v2.variants(own, "all_reduce", 1 << 20, 0)[0] == text
    customar_v2.use_variants(own, ())
    assert native.calls[-2] == ("shapes", policy.flat(policy.rows_for(9, 2)))
    assert customar_v2.variants(own, "all_reduce", 1 << 20, 0) == before


def test_calls_on_padded_batches(context: comm.GroupContext) -> None:
    native = Native()
    own = connect(native, context)
    count = torch.zeros(1, dtype=torch.int32)
    padded = customar_v2.padded_session(own, count)
    assert native.calls[-1] == ("padded", count.data_ptr())
    x = torch.ones(3, 8)
    assert torch.equal(customar_v2.all_reduce(padded, x, None), x * 2)
    assert customar_v2.all_reduce_add_rms_norm(padded, x, x, x[0], 1e-5, 0.5, None, None) is not NotImplemented
    scale, out = torch.empty(3, 1), torch.empty(3, 8, dtype=torch.float8_e4m3fn)
    quantised = (x, x, x[0], 1e-5, 0.5, "fp8_per_token", scale, out, torch.empty_like(x), None)
    assert customar_v2.all_reduce_add_rms_norm_quant(padded, *quantised) is None
    native.missing = 2
    with pytest.raises(comm.CommTimeoutError, match=r"rank 1 \(7 in the job\)"):
        customar_v2.all_reduce(padded, x, None)
    native.has_padded = False
    assert customar_v2.padded_session(own, count) is NotImplemented


@pytest.mark.parametrize("in_place", [False, True])
def test_a_fused_call(context: comm.GroupContext, in_place: bool) -> None:
    own = connect(Native(), context)
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.nn.Parameter(torch.randn(8))
    wanted = fallback.add_rms_norm(x * 2, residual, weight, 1e-5, 0.5, None, None)
    out, residual_out = (x, residual) if in_place else (None, None)
    got = customar_v2.all_reduce_add_rms_norm(own, x, residual, weight, 1e-5, 0.5, out, residual_out)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    assert (got[0] is x, got[1] is residual) == (in_place, in_place)


@pytest.mark.parametrize("form", QUANTS)
@pytest.mark.parametrize("with_norm", [False, True])
def test_a_quantised_call(context: comm.GroupContext, form: str, *, with_norm: bool) -> None:
    own = connect(Native(), context)
    x, residual, weight = torch.randn(3, 256), torch.randn(3, 256), torch.randn(256)
    wanted, summed = fallback.add_rms_norm(x * 2, residual, weight, 1e-5, 0.5, None, None)
    scales = [torch.full({"fp8_static": (1,), "fp8_per_token": (3, 1)}.get(form, (3, 2)), 0.1) for _ in range(2)]
    due, _ = fallback.quantize(wanted, form, scales[0])
    out, total = torch.empty(3, 256, dtype=torch.float8_e4m3fn), torch.empty_like(x)
    norm = torch.empty_like(x) if with_norm else None
    arguments = (x, residual, weight, 1e-5, 0.5, form, scales[1], out, total, norm)
    assert customar_v2.all_reduce_add_rms_norm_quant(own, *arguments) is None
    assert torch.equal(out.view(torch.uint8), due.view(torch.uint8))
    assert torch.equal(*scales)
    assert torch.equal(total, summed)
    assert norm is None or torch.equal(norm, wanted)


def test_a_quantised_call_that_the_native_code_declines(context: comm.GroupContext) -> None:
    own = connect(Native(), context)
    x = torch.ones(1, 20480)
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    arguments = (x, x, x[0], 1e-5, 0.5, "fp8_per_token", torch.empty(1, 1), out, torch.empty_like(x), None)
    assert customar_v2.all_reduce_add_rms_norm_quant(own, *arguments) is NotImplemented


def test_a_fused_call_that_the_native_code_declines(context: comm.GroupContext) -> None:
    own = connect(Native(), context)
    x, residual, weight = torch.randn(8, 3).t(), torch.randn(3, 8), torch.randn(8)
    out, residual_out = torch.zeros(3, 8), residual.clone()
    arguments = x, residual, weight, 1e-5, 0.5, out, residual_out
    assert customar_v2.all_reduce_add_rms_norm(own, *arguments) is NotImplemented
    assert not out.any()
    assert torch.equal(residual_out, residual)


def test_a_kernel_that_timed_out_names_the_rank(context: comm.GroupContext) -> None:
    native = Native()
    own = connect(native, context)
    customar_v2.check(own)
    native.missing = 2
    for call in (
        lambda: customar_v2.check(own),
        lambda: customar_v2.all_reduce(own, torch.ones(8), None),
        lambda: customar_v2.all_reduce_add_rms_norm(own, *map(torch.ones, [(2, 8), (2, 8), 8]), 1e-6, 0.0, None, None),
    ):
        with pytest.raises(
            comm.CommTimeoutError, match=r"rank 1 \(7 in the job\) didn't come within 3 s, or called with another"
        ) as caught:
            call()
        assert caught.value.ranks == (1,)


def test_waits_are_by_peer_in_microseconds_until_the_session_is_closed(context: comm.GroupContext) -> None:
    own = connect(Native(), context)
    assert customar_v2.waits(own) == {1: (3, 4.5, 2.5)}
    own.suspend()
    customar_v2.abort(own)
    assert customar_v2.waits(own) == {1: (3, 4.5, 2.5)}
    customar_v2.close(own, True)
    assert customar_v2.waits(own) == {}


def test_after_abort_check_reports_replays_alone(context: comm.GroupContext) -> None:
    native = Native()
    own = connect(native, context)
    native.missing = 2
    customar_v2.abort(own)
    customar_v2.abort(own)
    assert native.calls.count("abort") == 2
    for _ in range(2):
        customar_v2.check(own)  # the time-out was reported before
    for launches in (1, 3):
        own.buffer.tensor[:8].view(torch.int64).add_(launches << 20)  # as kernels do
        with pytest.raises(comm.CommError, match="in the replay of a graph"):
            customar_v2.check(own)
        customar_v2.check(own)
    customar_v2.close(own, True)
    customar_v2.abort(own)
    customar_v2.check(own)


@pytest.mark.parametrize("orderly", [True, False])
def test_close_is_idempotent_and_frees_nothing_under_running_kernels(
    context: comm.GroupContext, orderly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(kernel_session, "_kept_until_exit", kept)
    native = Native()
    own = connect(native, context)
    customar_v2.close(own, orderly)
    customar_v2.close(own, orderly)
    assert ("abort" in native.calls) is not orderly
    assert len(kept) == (0 if orderly else 1)
    assert own.buffer.calls == ["close"] * orderly  # type: ignore[attr-defined]
    customar_v2.check(own)


def test_what_fails_on_one_rank_alone_fails_before_the_exchange(context: comm.GroupContext) -> None:
    class NoKernel(Native):
        def connect(self, *arguments: Any) -> dict[str, Any]:
            def refuse(numbers: list[int]) -> None:
                raise ValueError("no such kernel")

            return super().connect(*arguments) | {"set_shapes": refuse}

    with pytest.raises(ValueError, match="no such kernel"):
        connect(NoKernel(), context)
    assert context.control.steps == []  # type: ignore[attr-defined]
