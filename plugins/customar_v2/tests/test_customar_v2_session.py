"""What a session does on the host, against a fake of the native code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comm_core as comm
import comm_plugin_customar_v2 as customar_v2
import pytest
import torch
from comm_core import fallback
from comm_plugin_customar_v2 import memory, norm_policy, policy, session


class Native:
    """Takes what the module takes, and notes it."""

    def __init__(self, algorithms: int = len(policy.ALGORITHMS)) -> None:
        self.algorithms = [algorithms, len(norm_policy.ALGORITHMS)]
        self.calls: list[Any] = []
        self.missing = 0
        self.unshareable = False

    def constants(self) -> list[int]:
        return [65792, *self.algorithms]

    def connect(self, *arguments: Any) -> list[Any]:
        self.calls.append(("connect", *arguments))

        def into(tensor: torch.Tensor, out: torch.Tensor, row: int) -> None:
            if row:
                self.calls.append(("row", row, out is tensor))
            if self.missing:
                raise RuntimeError("a kernel gave up")
            out.copy_(tensor * 2)

        def fresh(tensor: torch.Tensor, row: int) -> torch.Tensor:
            into(tensor, out := torch.empty_like(tensor), row)
            return out

        return [
            into,
            fresh,
            lambda numbers: self.calls.append(("shapes", numbers)),
            lambda: self.missing,
            lambda _: 2,
            lambda: self.calls.append("abort"),
            lambda _: None,
            lambda addresses, count: self.calls.append(("attach", addresses, count)),
            lambda numbers, table: self.calls.append(("registered", numbers, table)),
            self.norms,
        ]

    def peer_memory(self, _: int | None) -> list[Any]:
        def locate(address: int, nbytes: int) -> list[Any]:
            if self.unshareable:
                raise RuntimeError("its allocation can't be shared")
            return [0, 0, address, nbytes, str(address)]

        # Every allocation of the peer's is opened at the same place; nothing is in pieces.
        return [locate, lambda *_: b"handle", lambda _: 1 << 40, None, None, None, lambda: self.calls.append("closed")]

    def norms(self) -> list[Any]:
        def norm_into(
            tensor: torch.Tensor,
            residual: torch.Tensor,
            weight: torch.Tensor,
            out: torch.Tensor,
            residual_out: torch.Tensor,
            eps: float,
            weight_offset: float,
        ) -> bool:
            if self.missing:
                raise RuntimeError("a kernel waited in vain")
            if not tensor.is_contiguous():
                return False
            assert not weight.requires_grad
            fallback.add_rms_norm(tensor * 2, residual, weight, eps, weight_offset, out, residual_out)
            return True

        return [norm_into, lambda numbers: self.calls.append(("norm shapes", numbers))]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> comm.GroupContext:
    steps: list[str] = []

    def all_gather(value: Any) -> list[Any]:
        steps.append("gather")
        return [value, [114, ""] if isinstance(value, list) else value]

    def agree(ok: bool, reason: str) -> comm.Agreement:
        steps.append("agree")
        return comm.Agreement(ok, {} if ok else {0: reason})

    barrier = lambda: steps.append("barrier")  # noqa: E731 - as the others, in a line
    control = SimpleNamespace(barrier=barrier, all_gather=all_gather, agree=agree, steps=steps)

    def exchange(self: memory.Symmetric, group: Any) -> None:
        steps.append("exchange")
        self.addresses = (self.tensor.data_ptr(), 4096)

    monkeypatch.setattr(memory.Symmetric, "exchange", exchange)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: steps.append("filled"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    group: Any = object()
    return comm.GroupContext(group, 0, 2, torch.device("cpu"), (4, 7), control, 256 << 20, 3.0)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(nbytes: int, device: torch.device) -> memory.Symmetric:
        return memory.Symmetric(torch.empty(nbytes, dtype=torch.uint8))

    monkeypatch.setattr(memory, "allocate", allocate)


def test_connect_fills_the_buffer_before_anybody_can_write_to_it(context: comm.GroupContext) -> None:
    native = Native()
    own = session.connect(native, 9, None, context)
    assert context.control.steps == ["filled", "gather", "exchange", "barrier"]  # type: ignore[attr-defined]
    (name, rank, world_size, layout, timeout_s, _), (_, shapes), (_, norm_shapes), attached = native.calls
    assert (name, rank, world_size, timeout_s, len(layout)) == ("connect", 0, 2, 3.0, 5)
    assert shapes == policy.flat(policy.rows_for(9, 2))
    assert norm_shapes == norm_policy.flat(norm_policy.rows_for(9, 2))
    buffer = own._buffer
    assert buffer is not None
    # The fewest multiprocessors of all ranks.
    assert attached == ("attach", [buffer.tensor.data_ptr(), 4096], 114)
    assert own.memory_nbytes == buffer.tensor.nbytes
    tails_at, staging_at = layout[0], layout[3]
    assert (buffer.tensor[tails_at:staging_at] == 0xFF).all()
    assert buffer.tensor[:8].view(torch.int64).item() == 1 << 20
    assert not buffer.tensor[8:tails_at].any()


def test_native_code_of_another_version_is_refused_before_the_exchange(context: comm.GroupContext) -> None:
    with pytest.raises(RuntimeError, match="another version"):
        session.connect(Native(3), 9, None, context)
    assert context.control.steps == []  # type: ignore[attr-defined]


def test_the_hot_path(context: comm.GroupContext) -> None:
    own = session.connect(Native(), 9, None, context)
    x = torch.ones(8)
    assert torch.equal(customar_v2.all_reduce(own, x, None), x * 2)
    assert customar_v2.all_reduce(own, x, x) is x
    assert torch.equal(x, torch.full((8,), 2.0))
    assert own.algorithm_of(16) == "twoshot_push"


@pytest.mark.parametrize("in_place", [False, True])
def test_a_fused_call(context: comm.GroupContext, in_place: bool) -> None:
    own = session.connect(Native(), 9, None, context)
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.nn.Parameter(torch.randn(8))
    wanted = fallback.add_rms_norm(x * 2, residual, weight, 1e-5, 0.5, None, None)
    out, residual_out = (x, residual) if in_place else (None, None)
    got = customar_v2.all_reduce_add_rms_norm(own, x, residual, weight, 1e-5, 0.5, out, residual_out)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    assert (got[0] is x, got[1] is residual) == (in_place, in_place)


def test_a_fused_call_that_the_native_code_declines(context: comm.GroupContext) -> None:
    own = session.connect(Native(), 9, None, context)
    x, residual, weight = torch.randn(8, 3).t(), torch.randn(3, 8), torch.randn(8)
    out, residual_out = torch.zeros(3, 8), residual.clone()
    arguments = x, residual, weight, 1e-5, 0.5, out, residual_out
    assert customar_v2.try_all_reduce_add_rms_norm(own, *arguments) is None
    with pytest.raises(ValueError, match="aren't as the hook's spec has them"):
        customar_v2.all_reduce_add_rms_norm(own, *arguments)
    assert not out.any()
    assert torch.equal(residual_out, residual)


def test_a_kernel_that_gave_up_names_the_rank(context: comm.GroupContext) -> None:
    native = Native()
    own = session.connect(native, 9, None, context)
    customar_v2.check(own)
    native.missing = 2
    for call in (
        lambda: customar_v2.check(own),
        lambda: customar_v2.all_reduce(own, torch.ones(8), None),
        lambda: customar_v2.all_reduce_add_rms_norm(own, *map(torch.ones, [(2, 8), (2, 8), 8]), 1e-6, 0.0, None, None),
    ):
        with pytest.raises(comm.CommTimeoutError, match=r"rank 1 \(7 in the job\) didn't come within 3 s") as caught:
            call()
        assert caught.value.ranks == (1,)


@pytest.mark.parametrize("orderly", [True, False])
def test_close_is_idempotent_and_frees_nothing_under_running_kernels(
    context: comm.GroupContext, orderly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    abandoned: list[Any] = []
    monkeypatch.setattr(session, "_abandoned", abandoned)
    native = Native()
    own = session.connect(native, 9, None, context)
    customar_v2.close(own, orderly)
    customar_v2.close(own, orderly)
    assert ("abort" in native.calls) is not orderly
    assert len(abandoned) == (0 if orderly else 1)
    customar_v2.check(own)


def test_what_fails_on_one_rank_alone_fails_before_the_exchange(context: comm.GroupContext) -> None:
    class NoKernel(Native):
        def connect(self, *arguments: Any) -> list[Any]:
            functions = super().connect(*arguments)

            def refuse(numbers: list[int]) -> None:
                raise ValueError("no such kernel")

            return [*functions[:2], refuse, *functions[3:]]

    with pytest.raises(ValueError, match="no such kernel"):
        session.connect(NoKernel(), 9, None, context)
    assert context.control.steps == ["filled"]  # type: ignore[attr-defined]


PULL = policy.parse_row("oneshot_pull")


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the stream captures, for tests to change."""
    state = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


def test_captured_calls_get_rows_and_warm_ups_dont(context: comm.GroupContext, capturing: list[bool]) -> None:
    native = Native()
    own = session.connect(native, 9, PULL, context, shareable=True)
    registry = own.registry
    assert registry is not None
    ((_, numbers, table),) = [call for call in native.calls if call[0] == "registered"]
    assert (numbers, table) == (policy.flat(policy.rows_for(9, 2, PULL)), registry.table.data_ptr())
    assert own._buffer is not None
    assert own.memory_nbytes == own._buffer.tensor.nbytes + registry.table.nbytes
    native.calls.clear()
    plain, x = (own.into, own.fresh), torch.ones(8)
    with customar_v2.capture_ctx(own):
        capturing[0] = False
        customar_v2.all_reduce(own, x, None)
        assert native.calls == []
        capturing[0] = True
        assert torch.equal(customar_v2.all_reduce(own, x, None), 2 * x)
        customar_v2.all_reduce(own, x, torch.empty_like(x))
        capturing[0] = False
    assert native.calls == [("row", 1 << 20, False), ("row", 2 << 20 | 1, False)]
    assert (own.into, own.fresh) == plain
    assert registry.table[:3].tolist() == [
        [1 << 20, x.data_ptr(), 1 << 40],
        [2 << 20 | 1, x.data_ptr(), 1 << 40],
        [0] * 3,
    ]
    # Outside of it a capture records the plan that needs no registration.
    capturing[0] = True
    native.calls.clear()
    customar_v2.all_reduce(own, x, None)
    assert native.calls == []


@pytest.mark.parametrize(("algorithm", "in_place"), [("oneshot_pull", False), ("twoshot_pull", True)])
def test_in_place_takes_a_row_too_but_overwrites_no_input_that_peers_read(
    context: comm.GroupContext, capturing: list[bool], algorithm: str, in_place: bool
) -> None:
    native = Native()
    own = session.connect(native, 9, policy.parse_row(algorithm), context, shareable=True)
    native.calls.clear()
    x = torch.ones(8)
    with customar_v2.capture_ctx(own):
        assert customar_v2.all_reduce(own, x, x) is x
    assert torch.equal(x, torch.full((8,), 2.0))
    assert native.calls == [("row", 1 << 20, in_place)]


def test_sizes_that_the_table_pushes_have_no_row(context: comm.GroupContext, capturing: list[bool]) -> None:
    native = Native()
    own = session.connect(native, 9, PULL, context, shareable=True)
    own._captured = (policy.Row(16, "oneshot_push"), policy.Row(64, "oneshot_pull"))
    native.calls.clear()
    with customar_v2.capture_ctx(own):
        for numel in (4, 8, 32):
            customar_v2.all_reduce(own, torch.ones(numel), None)
    assert native.calls == [("row", 1 << 20, False)]


@pytest.mark.parametrize("why", ["the table has no such row", "the topology", "the allocator", "a peer's allocator"])
def test_where_nothing_can_be_registered_nothing_is(
    context: comm.GroupContext, capturing: list[bool], why: str
) -> None:
    native = Native()
    native.unshareable = why == "the allocator"
    if why == "a peer's allocator":
        context.control.all_gather = lambda value: [value, [114, "can't be shared"]]  # type: ignore[method-assign]
    forced = None if why == "the table has no such row" else PULL
    own = session.connect(native, 9, forced, context, shareable=why != "the topology")
    steps = list(context.control.steps)  # type: ignore[attr-defined]
    with customar_v2.capture_ctx(own):
        customar_v2.all_reduce(own, torch.ones(8), None)
    assert own.registry is None
    assert not any(call[0] in ("registered", "row") for call in native.calls)
    assert context.control.steps == steps  # type: ignore[attr-defined]


def test_after_an_exception_calls_go_on_as_before(context: comm.GroupContext, capturing: list[bool]) -> None:
    own = session.connect(Native(), 9, PULL, context, shareable=True)
    registry, plain = own.registry, (own.into, own.fresh)
    assert registry is not None
    steps = list(context.control.steps)  # type: ignore[attr-defined]

    def fails() -> None:
        with customar_v2.capture_ctx(own):
            customar_v2.all_reduce(own, torch.ones(8), None)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (own.into, own.fresh) == plain
    assert context.control.steps == steps  # type: ignore[attr-defined]
    assert registry.used == 0


def test_a_replay_of_a_graph_that_was_never_registered_is_told(context: comm.GroupContext) -> None:
    native = Native()
    own = session.connect(native, 9, PULL, context, shareable=True)
    native.missing = session.NOT_REGISTERED
    for call in (lambda: customar_v2.check(own), lambda: customar_v2.all_reduce(own, torch.ones(8), None)):
        with pytest.raises(comm.CaptureError, match="whose capture didn't end well"):
            call()


@pytest.mark.parametrize("orderly", [True, False])
def test_close_unmaps_the_peers_inputs_but_not_under_running_kernels(
    context: comm.GroupContext, orderly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_abandoned", [])
    native = Native()
    own = session.connect(native, 9, PULL, context, shareable=True)
    for _ in range(2):
        customar_v2.close(own, orderly)
    assert native.calls.count("closed") == orderly
    with customar_v2.capture_ctx(own):
        pass  # a closed session passes through
