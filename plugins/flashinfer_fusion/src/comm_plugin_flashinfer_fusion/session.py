"""A group's session: its workspace, its growth, and the calls that use it."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import comm_core as comm
import torch
from comm_core import fallback

from comm_plugin_flashinfer_fusion import policy
from comm_plugin_flashinfer_fusion.library import Library

__all__ = ["Session"]

# Workspaces of sessions that were closed after a failure. Kernels may still use them, so they are referenced until the
# process ends.
_kept_until_exit: list[Any] = []


@dataclasses.dataclass
class _Workspace:
    """A workspace of FlashInfer.

    Attributes:
        value: FlashInfer's object; None once it is destroyed.
        numel: the number of elements of the largest message.
        nbytes: its device memory, in bytes.
        used: whether a kernel that uses it was launched or recorded.
        recorded: whether a graph may replay such a kernel.
    """

    value: Any
    numel: int
    nbytes: int
    used: bool = False
    recorded: bool = False


class Session:
    """This rank's part of the group.

    Attributes:
        memory_nbytes: the device memory of this rank's workspaces, in bytes.
    """

    def __init__(self, library: Library, context: comm.GroupContext) -> None:
        self.memory_nbytes = 0
        self._library = library
        self._context = context
        self._workspace: _Workspace | None = None
        # Smaller workspaces, which graphs may still replay.
        self._older: list[_Workspace] = []
        # The most tokens that are prepared, by dtype and hidden size.
        self._tokens: dict[tuple[torch.dtype, int], int] = {}
        # The stream of the last eager call.
        self._stream: torch.cuda.Stream | None = None
        self._raw_stream = -1

    def prepare(self, shapes: comm.Shapes) -> list[comm.Range] | None:
        """Create the workspace, or a larger one, and return the ranges served from now on. Collective.

        Every rank takes the same branches, since they depend only on shapes.

        Raises:
            MemoryError: it needs more than the group's budget.
            RuntimeError, CommError: it can't be created on this rank, or on another one.
        """
        if str(shapes.dtype).removeprefix("torch.") not in policy.DTYPES:
            return None
        tokens = policy.max_tokens(self._context.world_size, shapes.hidden_size, shapes.max_tokens)
        key = (shapes.dtype, shapes.hidden_size)
        if tokens <= self._tokens.get(key, 0):
            return None
        if self._workspace is None or self._workspace.numel < tokens * shapes.hidden_size:
            self._grow(tokens, shapes.hidden_size, shapes.dtype)
        self._tokens[key] = tokens
        return [policy.prepared_range(str(key[0]), key[1], most) for key, most in self._tokens.items()]

    def all_reduce_add_rms_norm(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over the ranks, add the residual and normalise; see the hook's spec."""
        workspace = self._workspace
        if (
            workspace is None
            or tensor.numel() > workspace.numel
            or tensor.element_size() != policy.ITEMSIZE
            # A range has no largest hidden size, but the kernel has one.
            or not policy.fits_kernel(tensor.shape[1])
        ):
            total = self.all_reduce(tensor, None)
            return fallback.add_rms_norm(
                total, residual, weight, eps, weight_offset, total if out is None else out, residual_out
            )
        if torch.cuda.is_current_stream_capturing():
            workspace.recorded = True
        else:
            self._order()
        workspace.used = True
        out = torch.empty_like(tensor) if out is None else out
        residual_out = torch.empty_like(residual) if residual_out is None else residual_out
        self._library.fuse(workspace.value, tensor, residual, weight, eps, weight_offset, out, residual_out)
        return out, residual_out

    def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Sum by torch.distributed; no range promises this operation."""
        return fallback.torch_distributed(self._context.group, tensor, out)

    def close(self, orderly: bool) -> None:
        """Free all workspaces; after a failure keep those that kernels may still use. Idempotent."""
        workspaces = [*self._older, *([self._workspace] if self._workspace else [])]
        self._older, self._workspace, self._stream = [], None, None
        self._tokens.clear()
        with contextlib.ExitStack() as stack:
            for workspace in workspaces:
                if orderly or not workspace.used:
                    stack.callback(self._destroy, workspace)
                else:
                    _kept_until_exit.append(workspace.value)

    def _grow(self, tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
        """Replace the workspace, if there is one, by a larger one. Collective."""
        context, old, numel = self._context, self._workspace, tokens * hidden_size
        kept = [*self._older, *([old] if old and old.recorded else [])]
        nbytes = policy.workspace_nbytes(context.world_size, numel)
        kept_nbytes = sum(workspace.nbytes for workspace in kept)
        if kept_nbytes + nbytes > context.memory_budget_nbytes:
            beside = f", beside {kept_nbytes} that recorded graphs still use" if kept_nbytes else ""
            raise MemoryError(
                f"a workspace for messages of {numel * policy.ITEMSIZE} bytes needs {nbytes}{beside}, and the budget "
                f"is {context.memory_budget_nbytes} (COMM_CORE_MEMORY_BUDGET_NBYTES)"
            )
        torch.cuda.synchronize(context.device)
        # No rank's kernel uses the old one any more.
        context.control.barrier()
        self._workspace, self._older, self.memory_nbytes = None, kept, kept_nbytes
        if old and not old.recorded:
            self._destroy(old)
        # Memory that a peer has mapped is freed only once that peer has unmapped it, too.
        context.control.barrier()
        free = torch.cuda.mem_get_info(context.device)[0]
        if free < nbytes:
            raise MemoryError(
                f"a workspace for messages of {numel * policy.ITEMSIZE} bytes needs {nbytes}, and the device has "
                f"{free} free"
            )
        # If a rank has too little memory, all ranks raise here, before FlashInfer's own exchange.
        context.control.barrier()
        self._workspace = _Workspace(self._library.create(context, tokens, hidden_size, dtype), numel, nbytes)
        self.memory_nbytes = kept_nbytes + nbytes

    def _destroy(self, workspace: _Workspace) -> None:
        """Free it now, even if something else still references it, such as the frame of a kept exception."""
        value, workspace.value = workspace.value, None
        self._library.destroy(value)

    def _order(self) -> None:
        """Make this stream wait for the one of the last eager call: calls of one workspace must not overlap."""
        raw = _raw_stream(self._context.device)
        if raw == self._raw_stream:
            return
        stream = torch.cuda.current_stream(self._context.device)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                capturing = torch.cuda.is_current_stream_capturing()
            if capturing:
                raise comm.CommError(
                    "the stream of this group's last call is being captured by now, so a call on another stream can't "
                    "be ordered after it"
                )
            stream.wait_stream(self._stream)
        self._stream, self._raw_stream = stream, raw


def _raw_stream(device: torch.device) -> int:
    """Return the current stream's handle, by torch's private function if there is one: 0.1 us instead of 4."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # noqa: SLF001 - guarded
    return int(torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device.index))
