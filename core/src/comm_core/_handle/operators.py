"""The operators `torch.ops.comm_core`: the handles' calls for code that torch.compile traces.

all_reduce(tensor, group_name) -> Tensor
all_reduce_(tensor, group_name) -> ()                        in place
all_reduce_out(tensor, out, group_name) -> ()
all_reduce_add_rms_norm(tensor, residual, weight, group_name, eps, weight_offset) -> (Tensor, Tensor)
all_reduce_add_rms_norm_out(tensor, residual, weight, out, residual_out, group_name, eps, weight_offset) -> ()
all_reduce_add_rms_norm_quant(tensor, residual, weight, quant, scale, group_name, eps, weight_offset, *, with_norm,
    column_major_scales) -> (Tensor, Tensor, Tensor, Tensor)
all_reduce_add_rms_norm_quant_out(tensor, residual, weight, quant, scale, out, scale_out, residual_out, norm_out,
    group_name, eps, weight_offset) -> ()

Each also takes `num_tokens`, the `total` of a `TokenCounts`, by its name alone.

An operator finds the handle by the process group's `group_name`; "" is the world. Operators that write to an argument
return nothing, because torch.compile accepts no custom operator that returns an argument it mutates. Results carry no
gradient.

The operators are defined with `torch.library.Library`: a call costs 2 us, against 9 us for `torch.library.custom_op`,
which adds layers of Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from comm_core._handle import quant as forms
from comm_core._handle import traced
from comm_core._handle.backend import Backend
from comm_core._handle.compare import ComparingBackend
from comm_core.errors import CommError

if TYPE_CHECKING:
    from comm_core._handle.serving import Serving

__all__ = ["create_backend", "find_handle", "register", "unregister"]


class _Handles(dict[str, Backend]):
    """The handles of this process by group name. Any thread may look one up: torch.compile uses threads of its own."""

    def __missing__(self, group_name: str) -> NoReturn:
        title = f"group {group_name!r}" if group_name else "the world"
        raise CommError(
            f"torch.ops.comm_core: {title} has no handle in this process, or its handle was closed; handles exist "
            f"for {sorted(self)}. Call comm.get_backend(group) on all its ranks first, and pass group.group_name"
        )


_handles = _Handles()
#: Returns the current handle of the group with this name; None if it has none. A dictionary's method: it takes 30 ns.
find_handle: Callable[[str], Backend | None] = _handles.get

_GROUP = "str group_name=''"
_COMMON_ARGUMENTS = f"{_GROUP}, float eps=1e-6, float weight_offset=0.0"
_COUNT = "*, Tensor? num_tokens=None"


def create_backend(serving: Serving, group_name: str, *, compares_calls: bool) -> Backend:
    """Create the handle of a group, which isn't registered yet; `compares_calls` is the setting `COMM_CORE_DEBUG`."""
    return (ComparingBackend if compares_calls else Backend)(serving, group_name)


def register(names: tuple[str, ...], backend: Backend) -> None:
    """Register a handle under these group names."""
    for name in names:
        _handles[name] = backend


def unregister(backend: Backend) -> None:
    """Remove a handle from the registry, under every name."""
    for name, handle in _handles.copy().items():
        if handle is backend:
            _handles.pop(name, None)


def _all_reduce(tensor: torch.Tensor, group_name: str = "", *, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
    return _handles[group_name].all_reduce(tensor, num_tokens=num_tokens)


def _all_reduce_(tensor: torch.Tensor, group_name: str = "", *, num_tokens: torch.Tensor | None = None) -> None:
    _handles[group_name].all_reduce(tensor, tensor, num_tokens=num_tokens)


def _all_reduce_out(
    tensor: torch.Tensor, out: torch.Tensor, group_name: str = "", *, num_tokens: torch.Tensor | None = None
) -> None:
    _handles[group_name].all_reduce(tensor, _canonical_out(tensor, out), num_tokens=num_tokens)


def _fused(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    group_name: str = "",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    *,
    num_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    handle = _handles[group_name]
    return handle.all_reduce_add_rms_norm(tensor, residual, weight, eps, weight_offset, num_tokens=num_tokens)


def _fused_out(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual_out: torch.Tensor,
    group_name: str = "",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    *,
    num_tokens: torch.Tensor | None = None,
) -> None:
    _handles[group_name].all_reduce_add_rms_norm(
        tensor,
        residual,
        weight,
        eps,
        weight_offset,
        out=_canonical_out(tensor, out),
        residual_out=residual_out if residual is None else _canonical_out(residual, residual_out),
        num_tokens=num_tokens,
    )


def _quant(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    quant: str,
    scale: torch.Tensor | None = None,
    group_name: str = "",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    *,
    with_norm: bool = False,
    column_major_scales: bool = False,
    num_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the handle's results; an empty tensor for scales that are given, and for a norm that isn't asked for."""
    _refuse_scale_out(quant, scale)
    q, scales, s, y = _handles[group_name].all_reduce_add_rms_norm_quant(
        *(tensor, residual, weight, eps, weight_offset),
        quant=quant,
        scale=scale,
        column_major_scales=column_major_scales,
        with_norm=with_norm,
        num_tokens=num_tokens,
    )
    return q, tensor.new_empty(0, dtype=torch.float32) if scale is not None else scales, s, _or_empty(y, tensor)


def _or_empty(result: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(0) if result is None else result


def _refuse_scale_out(quant: str, scale: torch.Tensor | None) -> None:
    if scale is not None and not forms.is_static(quant):
        raise ValueError(f"{quant} has no scale as an input; all_reduce_add_rms_norm_quant_out takes a scale_out")


def _quant_out(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    quant: str,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    scale_out: torch.Tensor | None,
    residual_out: torch.Tensor,
    norm_out: torch.Tensor | None,
    group_name: str = "",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    *,
    num_tokens: torch.Tensor | None = None,
) -> None:
    _refuse_scale_out(quant, scale)
    _handles[group_name].all_reduce_add_rms_norm_quant(
        *(tensor, residual, weight, eps, weight_offset),
        quant=quant,
        scale=scale if scale_out is None else scale_out,
        out=out,
        residual_out=residual_out if residual is None else _canonical_out(residual, residual_out),
        norm_out=None if norm_out is None else _canonical_out(tensor, norm_out),
        num_tokens=num_tokens,
    )


def _canonical_out(tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return `tensor` if `out` has the same memory, shape and strides, else `out`.

    Compiled code may pass two tensor objects for the caller's one. The handle recognises an in-place call by identity,
    and would otherwise stage `out` through a copy.
    """
    same = (
        tensor.layout is out.layout is torch.strided
        and out.dtype == tensor.dtype
        and not tensor.is_complex()  # a tensor and its conjugate view also share memory
        and out.is_set_to(tensor)
    )
    return tensor if same else out


def _fake_fused(
    tensor: torch.Tensor, residual: torch.Tensor | None, *_rest: Any, **_named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return traced.empty_contiguous(tensor), traced.empty_contiguous(tensor if residual is None else residual)


def _fake_quant(
    tensor: torch.Tensor,
    residual: torch.Tensor | None,
    _weight: torch.Tensor,
    quant: str,
    *_rest: Any,
    with_norm: bool = False,
    column_major_scales: bool = False,
    **_named: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    forms.check_form(quant, tensor.shape[-1])
    return (
        forms.empty_out(tensor),
        tensor.new_empty(0, dtype=torch.float32)
        if forms.is_static(quant)
        else forms.empty_scale(tensor, quant, column_major_scales),
        traced.empty_contiguous(tensor if residual is None else residual),
        traced.empty_contiguous(tensor) if with_norm else tensor.new_empty(0),
    )


def _fake_none(*_rest: Any, **_named: Any) -> None:
    """Trace an operator that only writes to its arguments."""


_library = cast("Any", torch.library.Library)("comm_core", "DEF")


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    # Keep the traced strides: Inductor pads rows otherwise, and a padded input would be staged through a copy.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(schema, tags=tags)
    _library.impl(name, function, "CompositeExplicitAutograd")
    # Without this kernel torch would attach a gradient function that warns when used; results carry no gradient.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"comm_core::{name}", fake, lib=_library)


_define(f"all_reduce(Tensor tensor, {_GROUP}, {_COUNT}) -> Tensor", _all_reduce, traced.empty_contiguous)
_define(f"all_reduce_(Tensor(a!) tensor, {_GROUP}, {_COUNT}) -> ()", _all_reduce_, _fake_none)
_define(f"all_reduce_out(Tensor tensor, Tensor(a!) out, {_GROUP}, {_COUNT}) -> ()", _all_reduce_out, _fake_none)
_define(
    f"all_reduce_add_rms_norm(Tensor tensor, Tensor? residual, Tensor weight, {_COMMON_ARGUMENTS}, {_COUNT}) "
    "-> (Tensor, Tensor)",
    _fused,
    _fake_fused,
)
_define(
    "all_reduce_add_rms_norm_out(Tensor tensor, Tensor? residual, Tensor weight, Tensor(a!) out, "
    f"Tensor(b!) residual_out, {_COMMON_ARGUMENTS}, {_COUNT}) -> ()",
    _fused_out,
    _fake_none,
)
_define(
    "all_reduce_add_rms_norm_quant(Tensor tensor, Tensor? residual, Tensor weight, str quant, Tensor? scale=None, "
    f"{_COMMON_ARGUMENTS}, {_COUNT}, bool with_norm=False, bool column_major_scales=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _quant,
    _fake_quant,
)
_define(
    "all_reduce_add_rms_norm_quant_out(Tensor tensor, Tensor? residual, Tensor weight, str quant, Tensor? scale, "
    "Tensor(a!) out, Tensor(b!)? scale_out, Tensor(c!) residual_out, Tensor(d!)? norm_out, "
    f"{_COMMON_ARGUMENTS}, {_COUNT}) -> ()",
    _quant_out,
    _fake_none,
)


# torch.compile traces the function in this attribute instead of the method; a check inside the method would cost every
# eager call. A torch version that ignores the attribute breaks the graph at the call, and still gives right results.
for _class in (Backend, ComparingBackend):
    _class.all_reduce._torchdynamo_inline = traced.all_reduce  # type: ignore[attr-defined]  # noqa: SLF001
    _class.all_reduce_add_rms_norm._torchdynamo_inline = traced.all_reduce_add_rms_norm  # type: ignore[attr-defined]  # noqa: SLF001
    _class.all_reduce_add_rms_norm_quant._torchdynamo_inline = traced.all_reduce_add_rms_norm_quant  # type: ignore[attr-defined]  # noqa: SLF001
