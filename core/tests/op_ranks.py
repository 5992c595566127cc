"""What runs in the ranks for test_ops.py: the handles' calls as operators, eager and compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist
from handle_ranks import Outcome, outcome

OPS = torch.ops.comm_core
HIDDEN = 16
#: Inductor takes seconds a graph, so it compiles the forms in which it may reuse memory.
REUSING = (
    "handle in place",
    "op in place",
    "op in place, both used",
    "op into itself",
    "op into what overlaps",
    "op fused into",
    "op fused in place",
)


class Layer(torch.nn.Module):
    """What a tensor-parallel layer ends with: a matrix product whose parts the ranks sum, a residual and a norm."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(dist.get_rank())
        # Small integers: their sums are exact in any order, so that results are compared bit for bit.
        part = torch.randint(-4, 5, (HIDDEN, HIDDEN), generator=generator).float()
        self.part = torch.nn.Parameter(part)
        self.norm = torch.nn.Parameter(torch.arange(1.0, HIDDEN + 1))
        self.call = call

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        return self.call(x @ self.part, residual, self.norm)


def batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(num_tokens * HIDDEN).reshape(num_tokens, HIDDEN) % 7 - 3.0
    return x, x.flip(0) + 1


def add_and_norm(
    total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    summed = total + residual
    return torch.nn.functional.rms_norm(summed, (HIDDEN,), weight, 1e-6), summed


def forms(backend: comm.Backend, name: str) -> dict[str, Callable[..., Any]]:
    """Every way to write the layer's end, `t` being this rank's part."""
    counts = comm.TokenCounts(4, 0, 1, "cpu")

    def padded(t: torch.Tensor) -> comm.TokenCounts:
        counts.bucket = counts.bucket if torch.compiler.is_compiling() else len(t)
        return counts

    def in_place(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        OPS.all_reduce_(t, name)
        return add_and_norm(t, r, w)

    def into(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        out = torch.empty_like(t)
        OPS.all_reduce_out(t, out, name)
        return add_and_norm(out, r, w)

    def into_itself(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        OPS.all_reduce_out(t, t, name)
        return add_and_norm(t, r, w)

    def into_what_overlaps(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        rows = torch.cat([t, t[:1]])
        OPS.all_reduce_out(rows[:-1], rows[1:], name)
        return add_and_norm(rows[1:], r, w)

    def still_used(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        # The sum goes where something else was read from, and is read from again.
        before = t * 1
        OPS.all_reduce_(t, name)
        return add_and_norm(t + before - before, r, w)

    def fused_into(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        out, residual_out = torch.empty_like(t), torch.empty_like(r)
        OPS.all_reduce_add_rms_norm_out(t, r, w, out, residual_out, name)
        return out, residual_out

    def fused_in_place(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        r = r.clone()
        OPS.all_reduce_add_rms_norm_out(t, r, w, t, r, name)
        return t, r

    def handle_fused_in_place(t: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        r = r.clone()
        return backend.all_reduce_add_rms_norm(t, r, w, residual_out=r)

    return {
        "handle": lambda t, r, w: add_and_norm(backend.all_reduce(t), r, w),
        "handle in place": lambda t, r, w: add_and_norm(backend.all_reduce(t, out=t), r, w),
        "handle into": lambda t, r, w: add_and_norm(backend.all_reduce(t, torch.empty_like(t)), r, w),
        "handle fused": lambda *layer: backend.all_reduce_add_rms_norm(*layer),  # noqa: PLW0108 - what is traced
        "handle fused in place": handle_fused_in_place,
        "op": lambda t, r, w: add_and_norm(OPS.all_reduce(t, name), r, w),
        "op in place": in_place,
        "op into": into,
        "op into itself": into_itself,
        "op into what overlaps": into_what_overlaps,
        "op in place, both used": still_used,
        "handle padded": lambda t, r, w: add_and_norm(backend.all_reduce(t, num_tokens=padded(t)), r, w),
        "handle fused padded": lambda *layer: backend.all_reduce_add_rms_norm(*layer, num_tokens=padded(layer[0])),
        "op padded": lambda t, r, w: OPS.all_reduce_add_rms_norm(t, r, w, name, num_tokens=padded(t).total),
        "op fused": lambda t, r, w: OPS.all_reduce_add_rms_norm(t, r, w, name),
        "op fused into": fused_into,
        "op fused in place": fused_in_place,
    }


def expected(group: dist.ProcessGroup | None, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What every form gives, by torch.distributed."""
    layer = Layer(lambda *layer: layer[0])
    x, residual = batch(num_tokens)
    with torch.no_grad():
        total = layer(x, residual)
        dist.all_reduce(total, group=group)
        return add_and_norm(total, residual, layer.norm)


def agrees(found: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> bool:
    # The sums are integers; a norm differs in its last bit by who computes it.
    return torch.equal(found[1], right[1]) and torch.allclose(found[0], right[0])


def every_form(compiler: str | None, sizes: list[int]) -> dict[str, list[bool]]:
    """Each form, over the world, at several numbers of tokens: whether its results are right."""
    backend = comm.get_backend()
    rights = [expected(None, size) for size in sizes]
    found = {}
    for label, form in forms(backend, "").items():
        if compiler == "inductor" and label not in REUSING:
            continue
        torch._dynamo.reset()
        layer: Callable[..., Any] = Layer(form)
        if compiler is not None:
            # One graph for all sizes. Only the handle's forms meet a size and make it dynamic then, in a second graph.
            dynamic = None if compiler == "aot_eager" and label.startswith("handle") else True
            layer = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=dynamic)
        with torch.no_grad():
            found[label] = [agrees(layer(*batch(size)), right) for size, right in zip(sizes, rights, strict=True)]
    comm.close()
    return found


def defaults() -> dict[str, Any]:
    """Compare compiled calls that leave every option out with eager ones, for each of a handle's calls."""
    backend = comm.get_backend()
    x, residual = batch(4)
    weight = torch.arange(1.0, HIDDEN + 1)
    calls: dict[str, Callable[[], Any]] = {
        "sum": lambda: (backend.all_reduce(x),),
        "norm": lambda: backend.all_reduce_add_rms_norm(x, residual, weight),
        "quantised": lambda: backend.all_reduce_add_rms_norm_quant(x, residual, weight, quant="fp8_per_token")[:3],
    }
    found: dict[str, Any] = {"handle": type(backend).__name__}
    for name, call in calls.items():
        eager = call()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)()
        found[name] = all(torch.equal(one.float(), other.float()) for one, other in zip(eager, compiled, strict=True))
    return found


def groups_by_name(compiler: str) -> dict[str, Any]:
    """Three ranks in overlapping groups of two: which ranks a name sums over."""
    torch._dynamo.reset()
    rank = dist.get_rank()
    pairs = [[0, 1], [1, 2]]
    groups = [dist.new_group(pair) for pair in pairs]
    mine = {number: group for number, group in enumerate(groups) if rank in pairs[number]}
    backends = {number: comm.get_backend(group) for number, group in mine.items()}
    world = comm.get_backend()
    names = {number: backend.group_name for number, backend in backends.items()}
    x = torch.full((4,), 10.0**rank)
    assert names == {number: group.group_name for number, group in mine.items()}
    assert world.group_name == dist.group.WORLD.group_name

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {str(number): OPS.all_reduce(x, name) for number, name in names.items()}
        found |= {f"handle {number}": backend.all_reduce(x) for number, backend in backends.items()}
        return found | {"": OPS.all_reduce(x), "world": OPS.all_reduce(x, world.group_name)}

    eager, compiled = step(x), torch.compile(step, fullgraph=True, backend=compiler)(x)
    comm.close()
    return {
        "eager": {label: total[0].item() for label, total in eager.items()},
        "compiled": {label: total[0].item() for label, total in compiled.items()},
    }


def without_a_handle() -> dict[str, Outcome]:
    torch._dynamo.reset()
    x = torch.ones(1, 4)
    compiled = torch.compile(lambda x: OPS.all_reduce(x, "") + 1, fullgraph=True, backend="aot_eager")
    calls: dict[str, Callable[[], Any]] = {
        "functional": lambda: OPS.all_reduce(x),
        "in place": lambda: OPS.all_reduce_(x),
        "into": lambda: OPS.all_reduce_out(x, x),
        "fused": lambda: OPS.all_reduce_add_rms_norm(x, x, x[0]),
        "fused into": lambda: OPS.all_reduce_add_rms_norm_out(x, x, x[0], x, x),
        "compiled": lambda: compiled(x),
        "by name": lambda: OPS.all_reduce(x, dist.group.WORLD.group_name),
    }
    found = {name: outcome(call) for name, call in calls.items()}
    backend = comm.get_backend()
    traced = torch.compile(lambda x: backend.all_reduce(x) * 1, fullgraph=True, backend="aot_eager")
    assert compiled(x)[0, 0] == dist.get_world_size() + 1
    assert traced(x)[0, 0] == dist.get_world_size()
    found["nobody's"] = outcome(lambda: OPS.all_reduce(x, "nobody's"))
    comm.close()
    closed = {"compiled": lambda: compiled(x), "handle": lambda: traced(x)} | calls
    return found | {f"closed, {name}": outcome(call) for name, call in closed.items()}


def check_operators() -> list[dict[str, str]]:
    """torch's own checks of an operator: schema, fake kernel, autograd keys, functionalization."""
    comm.get_backend()
    x, residual = batch(3)
    weight = torch.ones(HIDDEN)
    arguments: dict[str, tuple[Any, ...]] = {
        "all_reduce": (x, ""),
        "all_reduce_": (x.clone(), ""),
        "all_reduce_out": (x, torch.empty_like(x), ""),
        "all_reduce_add_rms_norm": (x, residual, weight, "", 1e-5, 1.0),
        "all_reduce_add_rms_norm_out": (x, residual, weight, torch.empty_like(x), torch.empty_like(x), ""),
    }
    count = torch.full((1,), len(x), dtype=torch.int32)
    found = [
        torch.library.opcheck(getattr(OPS, name).default, given, named)
        for name, given in arguments.items()
        for named in ({}, {"num_tokens": count})
    ]
    # As a transposed view, and where autograd looks on.
    found.append(torch.library.opcheck(OPS.all_reduce.default, (x.t(), "")))
    comm.close()
    return found


def gradients(compiler: str | None) -> dict[str, Any]:
    """What of a call is differentiated: nothing, by the handle or by an operator."""
    torch._dynamo.reset()
    backend = comm.get_backend()

    def step(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        return (
            backend.all_reduce(y),
            OPS.all_reduce(y),
            *backend.all_reduce_add_rms_norm(y, y, weight),
            *OPS.all_reduce_add_rms_norm(y, y, weight),
            y + OPS.all_reduce(y),
        )

    run: Callable[..., Any] = step
    if compiler is not None:
        run = torch.compile(step, fullgraph=True, backend=compiler)
    x = torch.ones(2, 4, requires_grad=True)
    *results, mixed = run(x, torch.ones(4, requires_grad=True))
    mixed.sum().backward()
    comm.close()
    assert x.grad is not None
    return {"differentiated": [result.requires_grad for result in results], "beside": x.grad.unique().tolist()}


def more_of_compiled_code(compiler: str) -> dict[str, bool]:
    """Constants aren't folded, other threads find the handle, kinds that core stages or converts are right."""
    torch._dynamo.reset()
    backend = comm.get_backend()
    size = dist.get_world_size()

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        constant = OPS.all_reduce(torch.ones(4))
        return constant + 1, OPS.all_reduce(x[1:]), OPS.all_reduce(x.reshape(2, 4).t()), backend.all_reduce(x[:0])

    x = torch.arange(8.0)
    one, sliced, transposed, empty = torch.compile(step, fullgraph=True, backend=compiler)(x)
    threaded: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: threaded.append(OPS.all_reduce(x)))
    thread.start()
    thread.join()
    comm.close()
    return {
        "constant": torch.equal(one, torch.full((4,), size + 1.0)),
        "sliced": torch.equal(sliced, x[1:] * size),
        "transposed": torch.equal(transposed, x.reshape(2, 4).t() * size),
        "empty": empty.shape == (0,),
        "thread": torch.equal(threaded[0], x * size),
    }
