"""Functions that the ranks of test_misuse.py run: handles in forked children, under modes, and with unequal calls."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

import comm_core as comm
import faulty_plugins as faulty
import torch
import torch.distributed as dist
from handle_ranks import Outcome, hear, meet, outcome, say, warnings_of_core
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

# Longer than any step of a test takes, in seconds.
_LONG_S = 60


def _in_child(call: Callable[[], Any]) -> str:
    """Return the outcome of a call in a forked child; "hangs" if it doesn't end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, ": ".join(outcome(call)).encode())
        finally:
            os._exit(0)
    ready, _, _ = select.select([reader], [], [], _LONG_S)
    text = os.read(reader, 4096).decode() if ready else "hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    return text


def fork() -> dict[str, Any]:
    """Use a handle in a child of the first rank, then on all ranks."""
    backend = comm.get_backend()
    x = torch.full((64,), float(dist.get_rank() + 1))
    backend.all_reduce(x)
    found: dict[str, Any] = {}
    if dist.get_rank() == 0:
        row = x.view(1, 64)
        found = {
            "call": _in_child(lambda: backend.all_reduce(x)),
            "staged": _in_child(lambda: backend.all_reduce(x[1:])),
            "fused": _in_child(lambda: backend.all_reduce_add_rms_norm(row, row, x)),
            "operator": _in_child(lambda: torch.ops.comm_core.all_reduce(x)),
            "check": _in_child(backend.check),
            "get_backend": _in_child(comm.get_backend),
            "close": _in_child(comm.close),
        }
    meet("the children have ended")
    return found | {"sums": [backend.all_reduce(x + step)[0].item() for step in range(3)]}


def fork_without_world() -> str:
    """Get a handle of this process alone, and use it in a child."""
    dist.destroy_process_group()
    backend = comm.get_backend()
    return _in_child(lambda: backend.all_reduce(torch.ones(2)).tolist())


class _Layer(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _aot(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    aot_function(function, fw_compiler=keep)(x)  # type: ignore[no-untyped-call]
    return lambda tensor: graphs[0](tensor)[0]


def _under(mode: Any, call: Callable[[], Any]) -> Any:
    with mode:
        return call()


def modes(known: bool) -> dict[str, Any]:
    """Call the handle under everything that intercepts operators.

    Args:
        known: whether the size has been reduced often before, so that calls may take the hot path.
    """
    backend = comm.get_backend()
    x = torch.full((16,), float(dist.get_rank() + 1))
    row, weight = x.view(1, 16), torch.ones(16)
    for _ in range(20 * known):
        backend.all_reduce(x * 2)
        backend.all_reduce_add_rms_norm(row * 2, row, weight)

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        return backend.all_reduce(tensor * 2) + 1

    def in_place(tensor: torch.Tensor) -> torch.Tensor:
        doubled = tensor * 2
        backend.all_reduce(doubled, out=doubled)
        return doubled + 1

    def fused(tensor: torch.Tensor) -> torch.Tensor:
        doubled = (tensor * 2).view(1, 16)
        return backend.all_reduce_add_rms_norm(doubled, torch.ones_like(doubled), torch.ones(16))[1].view(16)

    found: dict[str, Any] = {}
    for name, function in {"plain": plain, "in place": in_place, "fused": fused}.items():
        recorders: dict[str, Callable[[], Any]] = {
            **{
                f"make_fx {mode}": lambda f=function, mode=mode: make_fx(f, tracing_mode=mode)(x)  # type: ignore[misc]
                for mode in ("real", "fake", "symbolic")
            },
            "export": lambda f=function: torch.export.export(_Layer(f), (x,), strict=False).module(),  # type: ignore[misc]
            "aot": lambda f=function: _aot(f, x),  # type: ignore[misc]
            "nothing": lambda f=function: f,  # type: ignore[misc]
        }
        for how, record in recorders.items():
            found[f"{name}, {how}"] = outcome(lambda r=record: r()(x + 1).tolist()[0])[1]  # type: ignore[misc]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return found | {
        "flop counter": outcome(lambda: _under(FlopCounterMode(display=False), lambda: plain(x)).tolist()[0])[1],
        "vmap": outcome(lambda: torch.func.vmap(plain)(x.view(4, 4)).flatten().tolist()[0])[1],
        "a fake input": type(_under(fake, lambda: backend.all_reduce(torch.ones(16)))) is FakeTensor,
        "a real input": type(_under(fake, lambda: backend.all_reduce(x))) is FakeTensor,
        "a real input, fused": type(_under(fake, lambda: backend.all_reduce_add_rms_norm(row, row, weight)[0]))
        is FakeTensor,
        "jit": outcome(lambda: torch.jit.trace(lambda t: backend.all_reduce(t), x, check_trace=False)),  # noqa: PLW0108
        "jit, fused": outcome(
            lambda: torch.jit.trace(lambda t: backend.all_reduce_add_rms_norm(t, t, weight)[0], row, check_trace=False)
        ),
        "afterwards": plain(x).tolist()[0],
    }


#: Whether `Bursts` fails: after its admission.
ARMED: list[bool] = []


class Bursts(faulty.Good):
    """Raises on the ranks in `on` once it is armed; the other ranks time out once these have raised."""

    def sum(self, session: faulty.Session, tensor: torch.Tensor) -> torch.Tensor:
        if not ARMED:
            return super().sum(session, tensor)
        if self.faulty:
            raise RuntimeError("kernel burst")
        hear("burst", self.on)
        raise comm.CommTimeoutError("rank 1 didn't come within 5 s", (1,))


def burst(learns_by_check: bool) -> list[Outcome]:
    """Let rank 1's backend raise, and go on calling on all ranks."""
    backend = comm.get_backend()
    x = torch.ones(7)
    backend.all_reduce(torch.ones(8))
    ARMED.append(True)
    found = []
    if dist.get_rank() == 1:
        found.append(outcome(lambda: backend.all_reduce(x)))
        say("burst")
    elif learns_by_check:
        hear("burst", [1])
        give_up = time.monotonic() + _LONG_S
        while (said := outcome(backend.check))[0] == "ok" and time.monotonic() < give_up:
            time.sleep(0.1)
        found.append(said)
    else:
        found.append(outcome(lambda: backend.all_reduce(x)))
    ARMED.clear()
    return [*found, outcome(lambda: backend.all_reduce(torch.ones(8))), outcome(backend.check)]


def before_the_world() -> dict[str, Any]:
    """Get a handle before the process group exists, and use it before and after."""
    dist.destroy_process_group()
    os.environ["WORLD_SIZE"] = "2"
    try:
        with warnings_of_core() as texts:
            early = comm.get_backend()
    finally:
        del os.environ["WORLD_SIZE"]
    alone = early.all_reduce(torch.ones(2)).tolist()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    row = torch.ones(1, 2)
    return {
        "warnings": texts,
        "alone": alone,
        "later": outcome(lambda: early.all_reduce(torch.ones(2))),
        "later, fused": outcome(lambda: early.all_reduce_add_rms_norm(row, row, torch.ones(2))),
        "new": comm.get_backend().all_reduce(torch.ones(2)).tolist(),
    }


def differ(how: str) -> tuple[list[Outcome], tuple[int, ...]]:
    """Make the same call twice, then a call that differs on rank 1, then another one."""
    backend = comm.get_backend()
    rank = dist.get_rank()
    x, row, weight = torch.ones(12), torch.ones(3, 4), torch.ones(4)
    odd = rank == 1
    calls: dict[str, Callable[[], Any]] = {
        "nothing": lambda: backend.all_reduce(x).tolist()[:1],
        "size": lambda: backend.all_reduce(torch.ones(13 if odd else 12)),
        "shape": lambda: backend.all_reduce(x.view(4, 3) if odd else x),
        "empty": lambda: backend.all_reduce(x[:0] if odd else x),
        "dtype": lambda: backend.all_reduce(x.int() if odd else x),
        "out": lambda: backend.all_reduce(x, torch.ones(7) if odd else torch.ones(12)),
        "no tensor": lambda: backend.all_reduce(None if odd else x),  # type: ignore[arg-type]
        "operation": lambda: (
            backend.all_reduce(row) if odd else backend.all_reduce_add_rms_norm(row, row.clone(), weight)
        ),
        "operator": lambda: torch.ops.comm_core.all_reduce(x[:11] if odd else x),
        "no call": lambda: None if odd else backend.all_reduce(x),
    }
    found = [outcome(calls["nothing"]), outcome(lambda: backend.all_reduce_add_rms_norm(row, row.clone(), weight)[1])]
    absent: tuple[int, ...] = ()
    try:
        found.append(("ok", str(calls[how]())))
    except Exception as error:  # noqa: BLE001 - the test looks at whatever it is
        absent = getattr(error, "ranks", ())
        found.append((type(error).__name__, str(error)))
    found.append(outcome(calls["nothing"]))
    return found, absent
