"""What runs in the ranks for test_tensors.py: tensors and outputs of every make, through one handle."""

from __future__ import annotations

from collections.abc import Callable

import comm_core as comm
import torch
import torch.distributed as dist

#: What makes a tensor of a value; sums of what it makes are what it makes of the sum.
Make = Callable[[int], torch.Tensor]


def _full(dtype: torch.dtype, *shape: int) -> Make:
    return lambda value: torch.full(shape or (16,), value).to(dtype)


def _misaligned(value: int) -> torch.Tensor:
    return torch.full((17,), float(value))[1:]


def _expanded(value: int) -> torch.Tensor:
    return torch.tensor(float(value)).expand(4, 4)


def _inference_copy(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


SUMMED: dict[str, Make] = {
    **{name: _full(getattr(torch, name)) for name in comm.types.DTYPES},
    "large": _full(torch.float32, 5000),
    "scalar": lambda value: torch.tensor(float(value)),
    "empty": _full(torch.float32, 3, 0),
    "complex32": lambda value: torch.full((16,), value * (1 + 2j)).to(torch.complex32),
    "complex64": lambda value: torch.full((16,), value * (1 + 2j)),
    "complex128": lambda value: torch.full((16,), value * (1 + 2j), dtype=torch.complex128),
    "an empty complex one": lambda value: torch.full((0,), value * 1j),
    "a conjugate": lambda value: torch.full((16,), value * (1 + 2j)).conj(),
    "a negative view": lambda value: torch.full((1,), value * (1 + 2j)).conj().imag,
    "a contiguous negative view": lambda value: torch._neg_view(torch.full((7,), float(-value))),
    "bool": _full(torch.bool),
    "an empty bool": _full(torch.bool, 0),
    "a parameter": lambda value: torch.nn.Parameter(torch.full((16,), float(value))),
    "transposed": lambda value: (torch.arange(12.0).reshape(3, 4) * value).t(),
    "strided": lambda value: (torch.arange(24.0) * value)[::2],
    "channels last": lambda value: _full(torch.float32, 1, 3, 2, 2)(value).to(memory_format=torch.channels_last),
    "misaligned": _misaligned,
    "expanded": _expanded,
    "with a gradient": lambda value: torch.full((16,), float(value), requires_grad=True),
}
REFUSED: dict[str, tuple[Make, type[Exception]]] = {
    "uint16": (_full(torch.uint16), TypeError),
    "float8": (_full(torch.float8_e4m3fn), TypeError),
    "quantised": (lambda value: torch.quantize_per_tensor(torch.full((16,), 1.0), value, 0, torch.qint8), TypeError),
    "sparse": (lambda value: torch.eye(4).to_sparse() * value, TypeError),
    "compressed": (lambda value: (torch.eye(4) * value).to_sparse_csr(), TypeError),
    "on another device": (lambda value: torch.full((16,), value, device="meta"), ValueError),
    "a part of one on another device": (lambda value: torch.full((16,), value, device="meta")[4:], ValueError),
    "sparse on another device": (lambda value: (torch.eye(4) * value).to_sparse().to("meta"), ValueError),
}
OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x,
    "another": torch.zeros_like,
    "the same memory": lambda x: x.view(-1),
    "overlapping": lambda x: x.new_zeros(0).set_(x.untyped_storage(), 4, x.shape, x.stride()),
    "misaligned": lambda x: torch.zeros(x.numel() + 1)[1:],
    "a parameter": lambda x: torch.nn.Parameter(torch.zeros_like(x)),
    "with a gradient": lambda x: torch.zeros(x.shape, requires_grad=True),
    "strided": lambda x: torch.zeros(2 * x.numel())[::2],
    "a negative view": lambda x: torch.zeros(x.numel(), dtype=torch.complex64).conj().imag,
    "a contiguous negative view": lambda x: torch._neg_view(torch.zeros_like(x)),
    "made in inference mode": _inference_copy,
    "made in inference mode, strided": lambda x: _inference_copy(x.repeat(2))[::2],
}
#: Elements of the tensors that are given outputs.
SIZES = (1, 16, 5000)
WRONG_OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "of another shape": lambda x: torch.zeros(x.numel() + 1),
    "of another shape, as large": lambda x: torch.zeros(x.numel(), 1),
    "of another dtype": lambda x: torch.zeros(x.shape, dtype=torch.float64),
    "on another device": lambda x: torch.zeros(x.shape, device="meta"),
}


def _call(call: Callable[[], bool]) -> str:
    try:
        return str(call())
    except Exception as error:  # noqa: BLE001 - the test looks at whatever it is
        return f"{type(error).__name__}: {error}"


def reduce_often() -> dict[str, str]:
    """ "True" for each kind of call with an output that was right each time, also once its route is kept."""
    backend = comm.get_backend()
    size, mine = dist.get_world_size(), dist.get_rank() + 1
    total = torch.full((4, 8), float(size * (size + 1) // 2))

    def leaf(value: float = mine) -> torch.Tensor:
        return torch.full((4, 8), float(value), requires_grad=True)

    def negated(value: float = mine) -> torch.Tensor:
        return torch._neg_view(torch.full((4, 8), -float(value)))

    def into(make: Callable[[], torch.Tensor], out: torch.Tensor) -> bool:
        required = out.requires_grad
        y = backend.all_reduce(make(), out=out)
        return y is out and torch.equal(y, total) and y.requires_grad is required and y.grad_fn is None

    def in_place(x: torch.Tensor) -> bool:
        return backend.all_reduce(x, out=x) is x and torch.equal(x, total)

    def fused_into(out: torch.Tensor) -> bool:
        x, weight = torch.full((4, 8), float(mine)), torch.ones(8)
        _, s = backend.all_reduce_add_rms_norm(x, None, weight, out=x, residual_out=out)
        return s is out and torch.equal(s, total)

    calls: dict[str, Callable[[], bool]] = {
        "a leaf, into another": lambda: into(leaf, torch.zeros(4, 8)),
        "no leaf, into another": lambda: into(lambda: leaf() * 1, torch.zeros(4, 8)),
        "a leaf, in place": lambda: in_place(leaf()),
        "an inference tensor, in place": lambda: in_place(_inference_copy(torch.full((4, 8), float(mine)))),
        "a negated view, out of place": lambda: torch.equal(backend.all_reduce(negated()), total),
        "a negated view, in place": lambda: in_place(negated()),
        "into a negated view": lambda: into(lambda: torch.full((4, 8), float(mine)), negated(0)),
        "fused, into an inference tensor": lambda: fused_into(_inference_copy(total)),
        "fused, into a negated view": lambda: fused_into(negated(0)),
    }
    found = {}
    for name, call in calls.items():
        outcomes = [_call(call) for _ in range(20)]
        found[name] = next((text for text in outcomes if text != "True"), "True")
        comm.close()
        backend = comm.get_backend()
    return found


def reduce_everything() -> dict[str, str]:
    """ "True" for each tensor whose sum was right, else what was raised."""
    backend = comm.get_backend()
    size, mine = dist.get_world_size(), dist.get_rank() + 1
    total = size * (size + 1) // 2

    def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        # torch compares no complex32.
        return torch.equal(*(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (one, other)))

    def is_sum(make: Make) -> bool:
        x = make(mine)
        kept = x.detach().clone()
        y = backend.all_reduce(x)
        fresh = y.is_contiguous() and not y.requires_grad and (y.data_ptr() != x.data_ptr() or x.numel() == 0)
        return equal(y, make(total)) and equal(x, kept) and fresh and y.dtype is x.dtype

    def fills(output: Callable[[torch.Tensor], torch.Tensor], numel: int) -> bool:
        # Room behind it, for an output that overlaps it.
        x = torch.full((numel + 4,), float(mine))[:numel]
        out = output(x)
        return backend.all_reduce(x, out=out) is out and torch.equal(out, torch.full((numel,), float(total)))

    found = {f"sum {name}": _call(lambda make=make: is_sum(make)) for name, make in SUMMED.items()}  # type: ignore[misc]
    for name, (make, _) in REFUSED.items():
        found[f"refused {name}"] = _call(lambda make=make: is_sum(make))  # type: ignore[misc]
    for numel in SIZES:
        for name, output in {**OUTPUTS, **WRONG_OUTPUTS}.items():
            found[f"out {numel} {name}"] = _call(lambda output=output, numel=numel: fills(output, numel))  # type: ignore[misc]
    # Whatever was refused left nothing behind on any rank.
    found["sum at last"] = _call(lambda: is_sum(SUMMED["float32"]))
    comm.close()
    return found
