from __future__ import annotations

import comm_core as comm
import pytest
import torch
from comm_core.types import Range
from fake_handle import ALL_REDUCE, TITLE, aligned, one_backend


def test_an_error_names_the_backend_and_keeps_its_cause() -> None:
    cause = RuntimeError("illegal address")
    backend, fast, _ = one_backend(error=cause)
    with pytest.raises(
        comm.CommError, match=r"backend 'fast' of group 'tp' \(ranks 0-1\) failed in all_reduce: ille"
    ) as e:
        backend.all_reduce(aligned(8))
    assert type(e.value) is comm.CommError
    assert e.value.__cause__ is cause
    x = aligned(16).view(2, 8)
    with pytest.raises(comm.CommError, match="failed in all_reduce_add_rms_norm: illegal address"):
        backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8))
    fast.error = None
    assert torch.equal(backend.all_reduce(x), 2 * x)


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
    for call in (
        lambda: backend.all_reduce(x),
        lambda: backend.all_reduce(x.t()),
        lambda: backend.all_reduce(torch.empty(0)),
        lambda: backend.all_reduce(torch.ones(2, dtype=torch.cfloat)),
        lambda: backend.all_reduce_add_rms_norm(x, x.clone(), weight),
        backend.check,
    ):
        with pytest.raises(comm.CommError, match=r"rank 1 didn't come .* create a new group"):
            call()
    assert len(fast.calls) == calls
    assert not last.calls


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), KeyboardInterrupt()])
def test_what_callers_handle_themselves_passes_as_it_is(error: BaseException) -> None:
    backend, fast, _ = one_backend(error=error)
    x = aligned(16).view(2, 8)
    with pytest.raises(type(error)) as raised:
        backend.all_reduce(x)
    assert raised.value is error
    with pytest.raises(type(error)):
        backend.all_reduce_add_rms_norm(x, x.clone(), aligned(8))
    fast.error = None
    assert torch.equal(backend.all_reduce(x), 2 * x)


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


def test_what_check_finds_is_named_and_a_timeout_retires() -> None:
    def fails(session: object) -> None:
        raise errors.pop()

    errors = [comm.CommTimeoutError("a kernel gave up waiting for rank 1", (1,)), ValueError("a word is odd")]
    backend, _, _ = one_backend(check=fails)
    with pytest.raises(comm.CommError, match=r"backend 'fast' of .* failed in check: a word is odd"):
        backend.check()
    backend.all_reduce(aligned(8))
    with pytest.raises(comm.CommTimeoutError, match="gave up waiting for rank 1"):
        backend.check()
    with pytest.raises(comm.CommError, match="gave up waiting for rank 1"):
        backend.all_reduce(aligned(8))


def test_a_handle_explains_itself() -> None:
    backend, _, _ = one_backend()
    assert repr(backend) == f"<comm_core.Backend 'fast' of {TITLE}>"
    assert backend.explain().startswith(f"{TITLE}: 2 ranks on one host, CPU tensors")
    assert "fast any size" in backend.explain()
