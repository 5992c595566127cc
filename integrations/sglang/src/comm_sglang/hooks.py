"""The functions of SGLang that this package wraps, by SGLang's own registry of hooks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from comm_sglang import door
from comm_sglang.communicator import CommAllReduce, subclass_of
from comm_sglang.groups import get_handle

if TYPE_CHECKING:
    import torch

__all__ = ["FUSED", "GROUPS", "Hook", "register", "unapplied", "workers"]


class Hook(NamedTuple):
    """A function of SGLang, and what runs in its place: it gets the original function first, then its arguments."""

    target: str
    around: Callable[..., Any]


# The groups that are being created, the innermost last.
_creations: list[_Creation] = []
# Whether a group of this process has got a handle. Without one comm_core isn't imported: it may be broken here.
_has_handles = False


class _Creation:
    """A group while SGLang creates it: asks once for a handle, when SGLang has created its process groups."""

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator

    @functools.cached_property
    def handle(self) -> Any:
        if self.coordinator.world_size == 1:
            return None
        hooks = [*GROUPS]
        if self.coordinator.device.type == "cuda":
            hooks += workers()
            register(hooks)
            _registry().apply_hooks()
        left_out = unapplied(hooks)
        return get_handle(self.coordinator, f"SGLang hasn't applied the hook on {left_out[0]}" if left_out else None)

    def choose_class(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what SGLang creates for its custom all-reduce: this package's, or the stock class."""
        if self.handle is None:
            return original(*args, **options)
        try:
            stock = original(*args, **options)
        except Exception:  # noqa: BLE001 - on CPUs SGLang has none, and asserts that it isn't asked
            stock = None
        return lambda **_given: subclass_of(stock)(self.coordinator, self.handle)

    def finish(self) -> None:
        """Give the group its object if SGLang didn't ask for one, as for groups of experts and on CPUs."""
        global _has_handles  # noqa: PLW0603 - a fact about the process
        _has_handles = _has_handles or self.handle is not None
        if self.handle is not None and not isinstance(self.coordinator.ca_comm, CommAllReduce):
            self.coordinator.ca_comm = subclass_of(None)(self.coordinator, self.handle)


def _create_group(original: Callable[..., None], coordinator: Any, *args: Any, **options: Any) -> None:
    creation = _Creation(coordinator)
    _creations.append(creation)
    try:
        original(coordinator, *args, **options)
    finally:
        _creations.pop()
    creation.finish()


def _choose_class(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    # SGLang calls it while it creates a group.
    if not _creations:
        return original(*args, **options)
    return _creations[-1].choose_class(original, *args, **options)


def _all_reduce(original: Callable[..., torch.Tensor], coordinator: Any, input_: torch.Tensor) -> torch.Tensor:
    """Sum a CPU tensor in place, as SGLang does; only CUDA tensors reach `ca_comm`."""
    ours = coordinator.ca_comm
    if input_.is_cpu and isinstance(ours, CommAllReduce) and ours.sums_cpu_tensors:
        return ours.handle.all_reduce(input_, input_)
    return original(coordinator, input_)


def _destroy(original: Callable[..., None], coordinator: Any) -> None:
    if isinstance(coordinator.ca_comm, CommAllReduce):
        coordinator.ca_comm.close()
    original(coordinator)


_STATE = "sglang.srt.distributed.parallel_state"
#: The hooks that SGLang applies when it loads this package.
GROUPS = (
    Hook(f"{_STATE}.GroupCoordinator.__init__", _create_group),
    Hook(f"{_STATE}.GroupCoordinator.all_reduce", _all_reduce),
    Hook(f"{_STATE}.GroupCoordinator.destroy", _destroy),
    Hook("sglang.srt.distributed.device_communicators.custom_all_reduce.dispatch_custom_allreduce", _choose_class),
)


def _prepare(original: Callable[..., Any], runner: Any) -> Any:
    """Prepare the backends where SGLang prepares its own: before it captures graphs, on all ranks."""
    from comm_sglang import fused

    if _has_handles:
        fused.prepare(getattr(runner, "model_runner", runner))
    return original(runner)


def _fuse(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    from comm_sglang import fused

    return fused.all_reduce_residual_rmsnorm(original, *args, **options)


def _make_workspaces(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    from comm_sglang import fused

    return None if fused.serves_every_group() else original(*args, **options)


_FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
#: The hooks on SGLang's fused norms.
FUSED = (
    Hook(f"{_FUSION}.flashinfer_allreduce_residual_rmsnorm", _fuse),
    Hook(f"{_FUSION}.pre_initialize_workspaces", _make_workspaces),
)


def workers() -> list[Hook]:
    """Return the hooks for ranks on GPUs, on modules that other processes of SGLang don't import."""
    runner = "runner.base_runner.BaseRunner" if door.release() >= (0, 5, 14) else "model_runner.ModelRunner"
    found = [Hook(f"sglang.srt.model_executor.{runner}._pre_initialize_flashinfer_allreduce_workspace", _prepare)]
    if os.environ.get("COMM_SGLANG_FUSED", "1").strip() != "0":
        found += FUSED
    return found


def register(hooks: Sequence[Hook]) -> None:
    """Register those hooks that aren't registered yet. SGLang applies them when it has loaded its plugins."""
    from sglang.srt.plugins.hook_registry import HookType

    registry = _registry()
    for target, around in hooks:
        if all(around is not hook for _, hook, *_ in registry._hooks.get(target, ())):  # noqa: SLF001 - recorded
            registry.register(target, around, HookType.AROUND)


def unapplied(hooks: Sequence[Hook]) -> list[str]:
    """Return the targets of `hooks` on which SGLang failed to apply them; it only logs that."""
    return [hook.target for hook in hooks if hook.target not in _registry()._patched]  # noqa: SLF001 - recorded


def _registry() -> Any:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return HookRegistry
