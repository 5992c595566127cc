from __future__ import annotations

import concurrent.futures
import copy
import io
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import comm_core as comm
import leaving_ranks as leaving
import odd_errors as odd
import pytest
import torch
from comm_core._handle import checks
from comm_core._handle.lookup import Routes
from comm_core.types import Range
from fake_handle import ALL_REDUCE, TITLE, aligned, one_backend


@pytest.mark.parametrize("fused", [False, True])
def test_an_error_names_the_backend_keeps_its_cause_and_stops_the_handle(*, fused: bool) -> None:
    cause = RuntimeError("illegal address")
    backend, fast, _ = one_backend(error=cause)
    x, weight = aligned(16).view(2, 8), aligned(8)
    hook = "all_reduce_add_rms_norm" if fused else "all_reduce"
    with pytest.raises(
        comm.CommError, match=rf"backend 'fast' of group 'tp' \(ranks 0-1\) failed in {hook}: ille"
    ) as e:
        backend.all_reduce_add_rms_norm(x, x.clone(), weight) if fused else backend.all_reduce(x)
    assert type(e.value) is comm.CommError
    assert e.value.__cause__ is cause
    fast.error = None
    assert_stopped(backend, "illegal address")
    assert len(fast.calls) == 1


def assert_stopped(backend: comm.Backend, reason: str) -> None:
    """Every later call raises the reason, whatever its tensors."""
    x = aligned(16).view(2, 8)
    for call in (
        lambda: backend.all_reduce(x),
        lambda: backend.all_reduce(x.t()),
        lambda: backend.all_reduce(torch.empty(0)),
        lambda: backend.all_reduce(torch.ones(2, dtype=torch.cfloat)),
        lambda: backend.all_reduce(torch.ones(2, dtype=torch.bool)),
        lambda: backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8)),
        lambda: backend.all_reduce_add_rms_norm(x[:0], x[:0], aligned(8)),
        backend.check,
    ):
        with pytest.raises(comm.CommError, match=rf"{reason}.* refuses further calls"):
            call()


def test_an_error_of_the_terminal_fallback_is_named_too() -> None:
    backend, _, last = one_backend(Range(ALL_REDUCE, dtypes=("int8",)))
    last.error = RuntimeError("connection closed")
    with pytest.raises(
        comm.CommError, match=r"backend 'torch_distributed' of .* failed in all_reduce: connection closed"
    ):
        backend.all_reduce(aligned(8))


def test_a_staged_call_names_the_backend_once() -> None:
    backend, _, _ = one_backend(error=RuntimeError("lost"))
    for x in (aligned(9)[1:], torch.ones(4, dtype=torch.cfloat)):
        with pytest.raises(comm.CommError) as raised:
            backend.all_reduce(x)
        assert str(raised.value).count("'fast'") == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_timeout_retires_the_handle(*, fused: bool) -> None:
    backend, fast, last = one_backend(error=comm.CommTimeoutError("rank 1 didn't come within 300 s", (1,)))
    x, weight = aligned(16).view(2, 8), aligned(8)
    with pytest.raises(comm.CommTimeoutError, match=r"backend 'fast' of .*: rank 1 didn't come") as raised:
        backend.all_reduce_add_rms_norm(x, x.clone(), weight) if fused else backend.all_reduce(x)
    assert raised.value.ranks == (1,)
    fast.error = None
    calls = len(fast.calls)
    assert_stopped(backend, "rank 1 didn't come")
    assert len(fast.calls) == calls
    assert not last.calls


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), KeyboardInterrupt()])
@pytest.mark.parametrize("fused", [False, True])
def test_errors_that_callers_handle_pass_unchanged_and_stop_the_handle(error: BaseException, *, fused: bool) -> None:
    backend, fast, _ = one_backend(error=error)
    x = aligned(16).view(2, 8)
    with pytest.raises(type(error)) as raised:
        backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8)) if fused else backend.all_reduce(x)
    assert raised.value is error
    fast.error = None
    assert_stopped(backend, str(error) or "KeyboardInterrupt")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [odd.Textless(), odd.Noteless("lost"), odd.own_cause(), odd.Rankless()])
@pytest.mark.parametrize("fused", [False, True])
def test_an_error_with_odd_methods_stops_the_handle(error: Exception, *, fused: bool) -> None:
    backend, fast, _ = one_backend(error=error)
    x = aligned(16).view(2, 8)
    with pytest.raises(comm.CommError, match=r"'fast' of .* failed in all_reduce.*: ") as raised:
        backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8)) if fused else backend.all_reduce(x)
    assert raised.value.__cause__ is error
    fast.error = None
    assert_stopped(backend, "'fast' of .* failed in all_reduce")


def test_an_exception_of_the_programs_signal_handler_stops_no_handle() -> None:
    returns = threading.Event()

    def check(_session: object) -> None:
        signal.raise_signal(signal.SIGUSR1)
        returns.wait(60)

    backend, _, _ = one_backend(check=check)
    with leaving.alarms(), pytest.raises(leaving.AlarmError):
        backend.check()
    returns.set()
    assert backend.failure is None
    assert torch.equal(backend.all_reduce(aligned(8)), 2 * aligned(8))


def test_a_refused_capture_leaves_the_handle_usable() -> None:
    backend, fast, _ = one_backend(error=comm.CaptureError("build first"))
    with pytest.raises(comm.CaptureError, match=r"'fast' of .* failed in all_reduce: build first"):
        backend.all_reduce(aligned(8))
    fast.error = None
    assert torch.equal(backend.all_reduce(aligned(8)), 2 * aligned(8))


@pytest.mark.parametrize("operand", ["tensor", "residual", "weight", "out", "residual_out"])
@pytest.mark.parametrize("value", [None, 1.0, [1.0], "x"], ids=str)
def test_an_operand_that_is_no_tensor_is_refused(operand: str, value: object) -> None:
    backend, fast, _ = one_backend()
    x = aligned(16).view(2, 8)
    operands: dict[str, Any] = {"tensor": x, "residual": x.clone(), "weight": aligned(8)}
    if value is None and operand not in ("tensor", "weight"):
        return  # None is a value of these operands
    with pytest.raises(TypeError, match=f"expected a torch.Tensor as {operand}; got {type(value).__name__}"):
        backend.all_reduce_add_rms_norm(**operands | {operand: value})
    if operand in ("tensor", "out"):
        with pytest.raises(TypeError, match=f"expected a torch.Tensor as {operand}; got {type(value).__name__}"):
            backend.all_reduce(**{"tensor": x} | {operand: value})
    assert not fast.calls
    assert torch.equal(backend.all_reduce(x), 2 * x)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda room: (room[:2], room[:2]),
        lambda room: (room[:2], room[:2].clone().set_(room[:2])),  # another tensor object of the same memory
        lambda room: (room[:2], room[1:3]),
        lambda room: (room[:2, :8], room.view(-1)[4:20].view(2, 8)),
        lambda room: (room.t()[:2, :4].t()[:2], room.t()[1:3, :4].t()[:2]),
    ],
)
def test_fused_outputs_that_share_memory_are_refused(outputs: Callable[[torch.Tensor], Any]) -> None:
    backend, fast, _ = one_backend()
    out, residual_out = outputs(torch.zeros(4, 8))
    x = torch.ones(out.shape)
    with pytest.raises(ValueError, match="out and residual_out share memory"):
        backend.all_reduce_add_rms_norm(x, x.clone(), torch.ones(x.shape[1]), out=out, residual_out=residual_out)
    assert not fast.calls


def test_fused_outputs_may_interleave() -> None:
    backend, _, _ = one_backend()
    room, x = torch.zeros(2, 16), torch.ones(2, 8)
    y, s = backend.all_reduce_add_rms_norm(x, x.clone(), torch.ones(8), out=room[:, ::2], residual_out=room[:, 1::2])
    assert torch.equal(room[:, 1::2], 3 * x)
    assert torch.equal(room[:, ::2], y)
    assert (y.data_ptr(), s.data_ptr()) == (room.data_ptr(), room[:, 1:].data_ptr())


@pytest.mark.parametrize(
    "size_and_strides", [((2, 2), (1, 1)), ((2, 3), (0, 1)), ((3, 3), (2, 1)), ((2, 2, 2), (3, 2, 1))]
)
def test_an_output_that_overlaps_itself_is_refused(size_and_strides: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    backend, fast, _ = one_backend()
    out = torch.zeros(64).as_strided(*size_and_strides)
    x = torch.ones(out.shape)
    for tensor in (x, out):  # also in place
        with pytest.raises(ValueError, match="several elements at one address"):
            backend.all_reduce(tensor, out)
    assert not fast.calls


@pytest.mark.parametrize("size_and_strides", [((2, 2), (1, 5)), ((2, 3), (3, 2)), ((3, 2), (2, 3)), ((1, 2), (0, 3))])
def test_an_output_with_gaps_takes_the_sum(size_and_strides: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    backend, _, _ = one_backend()
    out = torch.zeros(64).as_strided(*size_and_strides)
    assert backend.all_reduce(torch.ones(out.shape), out) is out
    assert torch.equal(out, torch.full(out.shape, 2.0))


@pytest.mark.parametrize("in_place", [False, True])
def test_freed_memory_is_refused(*, in_place: bool) -> None:
    backend, fast, _ = one_backend()
    for _ in range(20):  # later calls of one size take the hot path
        backend.all_reduce(torch.ones(64))
    fast.calls.clear()
    out = torch.zeros(64)
    out.untyped_storage().resize_(0)
    x = out if in_place else torch.ones(64)
    with pytest.raises(TypeError, match="has no memory"):
        backend.all_reduce(x, out)
    rows = torch.ones(1, 64)
    with pytest.raises(TypeError, match="has no memory"):
        backend.all_reduce_add_rms_norm(rows, rows.clone(), torch.ones(64), residual_out=out.view(1, 64))
    assert not fast.calls


def test_a_dtype_that_torch_refuses_leaves_the_handle_usable() -> None:
    backend, _, last = one_backend()
    last.error = RuntimeError("Invalid scalar type")
    with pytest.raises(TypeError, match=r"torch.bool can't be reduced: no backend .* Convert it first"):
        backend.all_reduce(torch.ones(4, dtype=torch.bool))
    last.error = None
    assert torch.equal(backend.all_reduce(aligned(8)), 2 * aligned(8))
    last.error = RuntimeError("connection reset by peer")
    with pytest.raises(comm.CommError, match=r"'torch_distributed' of .* failed in all_reduce: connection reset"):
        backend.all_reduce(torch.ones(4, dtype=torch.bool))
    assert_stopped(backend, "connection reset")


def test_a_second_thread_is_refused_and_stops_the_handle() -> None:
    backend, _, _ = one_backend()
    inside, finished = threading.Event(), threading.Event()

    def wait(_: object, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        inside.set()
        assert finished.wait(60)
        return tensor

    fast_hook = Routes.find(backend._serving.eager.all_reduce, (-1, torch.float32, 8))
    assert fast_hook is not None
    backend._serving.eager.all_reduce[(-1, torch.float32, 8)] = (wait, *fast_hook[1:])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(backend.all_reduce, aligned(8))
        assert inside.wait(60)
        for call in (
            lambda: backend.all_reduce(aligned(8)),
            lambda: backend.all_reduce(aligned(9)[1:]),
            lambda: backend.all_reduce_add_rms_norm(aligned(8).view(1, 8), aligned(8).view(1, 8), aligned(8)),
        ):
            with pytest.raises(comm.CommError, match="two threads used the handle of group 'tp'"):
                call()
        finished.set()
        assert torch.equal(first.result(60), aligned(8))
    assert_stopped(backend, "two threads used the handle")


def test_copies_of_a_handle_are_the_handle_and_it_is_not_pickled() -> None:
    backend, _, _ = one_backend()
    module = torch.nn.Module()
    module.handle = backend
    assert copy.copy(backend) is backend
    assert copy.deepcopy(module).handle is backend
    for dump in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
        with pytest.raises(TypeError, match=r"the handle of group 'tp' .* can't be pickled: .* call comm.get_backend"):
            dump(module)


def test_a_missing_gradient_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned_of_gradient", False)
    backend, _, _ = one_backend()
    x = aligned(8)
    backend.all_reduce(x)
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            backend.all_reduce(x)
        with torch.inference_mode():
            backend.all_reduce(x)
    with pytest.warns(UserWarning, match="requires grad, but the result carries no gradient") as warned:
        y = backend.all_reduce(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.all_reduce(x)
        backend.all_reduce_add_rms_norm(x.view(1, 8), x.view(1, 8), x.detach())
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert not y.requires_grad


def test_a_closed_handle_says_so() -> None:
    backend, fast, _ = one_backend()
    backend._serving.retire("group 'tp': its handle was closed")
    with pytest.raises(comm.CommError, match=r"^group 'tp': its handle was closed$"):
        backend.all_reduce(aligned(8))
    x, weight = aligned(8).view(1, 8), aligned(8)
    for residual in (x, x.to("meta")):
        with pytest.raises(comm.CommError, match=r"^group 'tp': its handle was closed$"):
            backend.all_reduce_add_rms_norm(x, residual, weight)
    assert not fast.calls


def test_check_asks_every_session_that_can_say_something() -> None:
    seen: list[object] = []
    backend, _, _ = one_backend(check=seen.append)
    backend.check()
    assert seen == ["session of fast"]
    one_backend()[0].check()


@pytest.mark.parametrize(
    "error", [comm.CommTimeoutError("a kernel gave up waiting for rank 1", (1,)), ValueError("a word is odd")]
)
def test_an_error_of_check_is_named_and_stops_the_handle(error: Exception) -> None:
    def fails(session: object) -> None:
        raise error

    backend, _, _ = one_backend(check=fails)
    kind = comm.CommTimeoutError if isinstance(error, comm.CommTimeoutError) else comm.CommError
    with pytest.raises(kind, match=rf"backend 'fast' of .* failed in check: {error}"):
        backend.check()
    assert_stopped(backend, str(error))


def test_a_handle_explains_itself() -> None:
    backend, _, _ = one_backend()
    assert repr(backend) == f"<comm_core.Backend 'fast' of {TITLE}>"
    assert backend.explain().startswith(f"{TITLE}: 2 ranks on one host, CPU tensors")
    assert "fast any size" in backend.explain()


def test_a_time_out_names_the_groups_that_share_the_gpu() -> None:
    error = comm.CommTimeoutError("rank 1 didn't come within 15 s", (1,))
    handles = [one_backend(error=error)[0] for _ in range(3)]
    for number, handle in enumerate(handles):
        serving = handle._serving
        serving.title, serving.control = f"group {number}", object()  # type: ignore[assignment]
        serving.device = torch.device("cuda", number % 2)
    assert handles[1]._serving.describe_other_groups() == ""
    text = handles[0]._serving.describe_other_groups()
    assert text.startswith(". Calls of group 2 use cuda:0, too: calls of two groups on two streams must be launched")
    handles[2]._serving.control = None
    handles[2]._serving.retire("it was closed")
    assert handles[0]._serving.describe_other_groups() == ""


def test_only_time_outs_name_other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, named in ((comm.CommTimeoutError("late", (1,)), True), (RuntimeError("illegal address"), False)):
        backend, _, _ = one_backend(error=error)
        monkeypatch.setattr(backend._serving, "describe_other_groups", lambda: ". Calls of others")
        with pytest.raises(comm.CommError) as raised:
            backend.all_reduce(aligned(16))
        assert (". Calls of others" in str(raised.value)) is named
