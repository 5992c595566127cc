"""The handles' calls as torch operators, for code that torch.compile traces: `torch.ops.comm_core`.

all_reduce(tensor, group_name) -> Tensor
all_reduce_(tensor, group_name) -> ()                        in place
all_reduce_out(tensor, out, group_name) -> ()
all_reduce_add_rms_norm(tensor, residual, weight, group_name, eps, weight_offset) -> (Tensor, Tensor)
all_reduce_add_rms_norm_out(tensor, residual, weight, out, residual_out, group_name, eps, weight_offset) -> ()

An operator finds the handle by the process group's `group_name`; "" is the world. What writes returns nothing, since
torch.compile takes no operator of others' making that returns what it writes. Nothing is differentiated.

Defined with `torch.library.Library`: `torch.library.custom_op` puts layers of Python around each call, 9 us against 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch

from comm_core._handle.backend import Backend
from comm_core.errors import CommError

__all__ = ["register", "unregister"]


class _Handles(dict[str, Backend]):
    """The handles of this process by group name. Any thread may look one up: torch.compile brings its own."""

    def __missing__(self, group_name: str) -> NoReturn:
        title = f"group {group_name!r}" if group_name else "the world"
        raise CommError(
            f"torch.ops.comm_core: {title} has no handle in this process, or its handle was closed; there are handles "
            f"of {sorted(self)}. Call comm.get_backend(group) on all its ranks before, and pass group.group_name"
        )


_handles = _Handles()

_FORMULA = "str group_name='', float eps=1e-6, float weight_offset=0.0"


def register(names: tuple[str, ...], backend: Backend) -> None:
    """Let the operators find a handle under these names."""
    for name in names:
        _handles[name] = backend


def unregister(backend: Backend) -> None:
    """Let no operator find this handle any more."""
    for name, handle in _handles.copy().items():
        if handle is backend:
            _handles.pop(name, None)


def _all_reduce(tensor: torch.Tensor, group_name: str = "") -> torch.Tensor:
    return _handles[group_name].all_reduce(tensor)


def _all_reduce_(tensor: torch.Tensor, group_name: str = "") -> None:
    _handles[group_name].all_reduce(tensor, tensor)


def _all_reduce_out(tensor: torch.Tensor, out: torch.Tensor, group_name: str = "") -> None:
    _handles[group_name].all_reduce(tensor, _itself(tensor, out))


def _fused(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    group_name: str = "",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _handles[group_name].all_reduce_add_rms_norm(tensor, residual, weight, eps, weight_offset)


def _fused_out(
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual_out: torch.Tensor,
    group_name: str = "",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> None:
    _handles[group_name].all_reduce_add_rms_norm(
        tensor,
        residual,
        weight,
        eps,
        weight_offset,
        out=_itself(tensor, out),
        residual_out=_itself(residual, residual_out),
    )


def _itself(tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`tensor` where `out` is the same memory seen alike: compiled code passes two objects where the caller had one.

    The handle takes the one object for in place, and would stage the other through a copy.
    """
    same = (
        tensor.layout is out.layout is torch.strided
        and out.dtype == tensor.dtype
        and not tensor.is_complex()  # a tensor and its conjugate are one memory, too
        and out.is_set_to(tensor)
    )
    return tensor if same else out


def _like(tensor: torch.Tensor, *_rest: Any, **_named: Any) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_fused(tensor: torch.Tensor, *_rest: Any, **_named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(tensor), _like(tensor)


def _fake_nothing(*_rest: Any, **_named: Any) -> None:
    """What only writes has no result."""


_library = cast("Any", torch.library.Library)("comm_core", "DEF")


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    # Strides as traced: Inductor pads rows where it may, and a padded input would be staged through a copy.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(schema, tags=tags)
    _library.impl(name, function, "CompositeExplicitAutograd")
    # Without it, torch would give the results a gradient that warns once it is used; a handle's have none.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"comm_core::{name}", fake, lib=_library)


_define("all_reduce(Tensor tensor, str group_name='') -> Tensor", _all_reduce, _like)
_define("all_reduce_(Tensor(a!) tensor, str group_name='') -> ()", _all_reduce_, _fake_nothing)
_define("all_reduce_out(Tensor tensor, Tensor(a!) out, str group_name='') -> ()", _all_reduce_out, _fake_nothing)
_define(
    f"all_reduce_add_rms_norm(Tensor tensor, Tensor residual, Tensor weight, {_FORMULA}) -> (Tensor, Tensor)",
    _fused,
    _fake_fused,
)
_define(
    "all_reduce_add_rms_norm_out(Tensor tensor, Tensor residual, Tensor weight, Tensor(a!) out, "
    f"Tensor(b!) residual_out, {_FORMULA}) -> ()",
    _fused_out,
    _fake_nothing,
)


def _traced_all_reduce(self: Backend, tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`Backend.all_reduce` as torch.compile traces it."""
    if out is None:
        result: torch.Tensor = torch.ops.comm_core.all_reduce(tensor, self.group_name)
        return result
    if out is tensor:
        torch.ops.comm_core.all_reduce_(tensor, self.group_name)
    else:
        torch.ops.comm_core.all_reduce_out(tensor, out, self.group_name)
    return out


def _traced_fused(
    self: Backend,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    *,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Backend.all_reduce_add_rms_norm` as torch.compile traces it."""
    if out is None and residual_out is None:
        pair: tuple[torch.Tensor, torch.Tensor] = torch.ops.comm_core.all_reduce_add_rms_norm(
            tensor, residual, weight, self.group_name, eps, weight_offset
        )
        return pair
    out = _like(tensor) if out is None else out
    residual_out = _like(residual) if residual_out is None else residual_out
    torch.ops.comm_core.all_reduce_add_rms_norm_out(
        tensor, residual, weight, out, residual_out, self.group_name, eps, weight_offset
    )
    return out, residual_out


# torch.compile traces this attribute of a function in the function's place; a question asked in the function itself
# would cost each eager call. A torch that ignored it would break the graph at a handle's call, and go on.
Backend.all_reduce._torchdynamo_inline = _traced_all_reduce  # type: ignore[attr-defined]  # noqa: SLF001
Backend.all_reduce_add_rms_norm._torchdynamo_inline = _traced_fused  # type: ignore[attr-defined]  # noqa: SLF001
