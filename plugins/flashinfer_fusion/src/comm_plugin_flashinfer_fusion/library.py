"""The part of FlashInfer that is used: all-reduce fusion with its backend "trtllm", which never uses multicast."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comm_core as comm
from packaging.version import Version

from comm_plugin_flashinfer_fusion.channel import Channel

if TYPE_CHECKING:
    import torch

__all__ = ["MIN_VERSION", "Library", "installed_version", "load", "missing"]

#: The oldest supported version, as in pyproject.toml.
MIN_VERSION = "0.7.1"
_DISTRIBUTION = "flashinfer-python"
# The arguments that are passed to its two functions.
_CREATE = {"backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "comm_backend", "group"}
_FUSE = {
    *("input", "workspace", "pattern", "launch_with_pdl", "output", "residual_out", "norm_out", "residual_in"),
    *("rms_gamma", "rms_eps", "use_oneshot", "fp32_acc", "weight_bias"),
}


def installed_version() -> str | None:
    """Return the version of FlashInfer's distribution; None if no distribution is installed."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> str | None:
    """Say why FlashInfer can't be used here, one sentence without a full stop; None if it can. Imports nothing."""
    if importlib.util.find_spec("flashinfer") is None:
        return f"flashinfer isn't installed: pip install '{_DISTRIBUTION}>={MIN_VERSION}'"
    version = installed_version()
    if version is not None and Version(version) < Version(MIN_VERSION):
        return f"{_DISTRIBUTION} {version} is older than {MIN_VERSION}: pip install '{_DISTRIBUTION}>={MIN_VERSION}'"
    return None


class Library:
    """FlashInfer's functions, after checking that they have the arguments that are passed to them.

    Args:
        module: `flashinfer.comm`.
        details: `flashinfer.comm.trtllm_ar`.
    """

    def __init__(self, module: Any, details: Any) -> None:
        self._create = _function(module, "create_allreduce_fusion_workspace", _CREATE)
        self._fuse = _function(module, "allreduce_fusion", _FUSE)
        self._pattern = int(module.AllReduceFusionPattern.kARResidualRMSNorm)
        self._destroy_ipc = getattr(details, "trtllm_destroy_ipc_workspace_for_all_reduce_fusion", None)
        # FlashInfer's own references to the buffers of workspaces. Releases without it keep none.
        self._references: dict[int, Any] = getattr(details, "_symm_workspace_refs", {})

    def create(self, context: comm.GroupContext, tokens: int, hidden_size: int, dtype: torch.dtype) -> Any:
        """Create a workspace for messages with as many elements as `[tokens, hidden_size]`. Collective.

        Raises:
            CommError: another rank failed; this rank's memory is freed.
            RuntimeError: this rank failed; its memory is freed if an allocation or an exchange failed.
        """
        before = set(self._references)
        try:
            return self._create(
                backend="trtllm",
                world_size=context.world_size,
                rank=context.rank,
                max_token_num=tokens,
                hidden_dim=hidden_size,
                dtype=dtype,
                comm_backend=Channel(context),
                group=context.group,
            )
        except Exception as error:
            _close_descriptors(error)
            for key in set(self._references) - before:
                del self._references[key]
            # The error's frames hold buffers for as long as the error is referenced.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, comm.CommError):
                raise
            shape, reason = f"[{tokens}, {hidden_size}]", f"{type(error).__name__}: {error}"
            raise RuntimeError(f"FlashInfer couldn't create a workspace for messages of {shape}: {reason}") from None

    def destroy(self, workspace: Any) -> None:
        """Free a workspace that no kernel uses any more. Local. The caller drops its reference, too."""
        handles = getattr(workspace, "ipc_handles", None)
        if self._destroy_ipc is not None and handles is not None:
            self._destroy_ipc(handles)
        workspace.destroy()

    def fuse(
        self,
        workspace: Any,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        out: torch.Tensor,
        residual_out: torch.Tensor,
    ) -> None:
        """Run one-shot all-reduce, residual and norm on the current stream; sums over ranks are in fp32."""
        self._fuse(
            input=tensor,
            workspace=workspace,
            pattern=self._pattern,
            launch_with_pdl=True,
            # Unused in this pattern, but FlashInfer would allocate it if it were None.
            output=out,
            residual_out=residual_out,
            norm_out=out,
            residual_in=residual,
            rms_gamma=weight,
            rms_eps=eps,
            use_oneshot=True,
            fp32_acc=True,
            weight_bias=weight_offset,
        )


def load() -> Library:
    """Import FlashInfer and build its kernels. Local; takes minutes unless they are cached.

    Raises:
        RuntimeError: this host or this release of FlashInfer isn't supported.
        Exception: any error of its import or build.
    """
    module: Any = importlib.import_module("flashinfer.comm")
    details: Any = importlib.import_module("flashinfer.comm.trtllm_ar")
    library = Library(module, details)
    confidential = getattr(importlib.import_module("flashinfer.utils"), "is_confidential_compute", None)
    if confidential is not None and confidential():
        # There FlashInfer uses torch's symmetric memory, which binds a multicast object, instead of its own.
        raise RuntimeError("under confidential computing FlashInfer's workspace would use NVLink multicast")
    build = getattr(details, "get_trtllm_comm_module", None)
    if build is not None:
        build()
    return library


def _close_descriptors(error: Exception) -> None:
    """Close this rank's memory handle if FlashInfer's exchange of handles failed: it holds the memory.

    `flashinfer.comm.fd_exchange.exchange_fds` leaves that to its caller, which in releases 0.7 doesn't do it.
    """
    version = installed_version()
    if version is not None and Version(version).release[:2] != (0, 7):
        return
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # The variables of this frame alone: to read them copies them, and other frames' would keep buffers.
        if frame.f_code.co_name == "exchange_fds" and isinstance(handle := frame.f_locals.get("local_fd"), int):
            with contextlib.suppress(OSError):
                os.close(handle)


def _function(module: Any, name: str, arguments: set[str]) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(module, name, None) or _unsupported(f"has no flashinfer.comm.{name}")
    parameters = inspect.signature(function).parameters
    lacking = sorted(arguments - set(parameters))
    if lacking and not any(value.kind is value.VAR_KEYWORD for value in parameters.values()):
        _unsupported(f"has a flashinfer.comm.{name} without {', '.join(lacking)}")
    return function


def _unsupported(lack: str) -> Any:
    raise RuntimeError(f"{_DISTRIBUTION} {installed_version() or 'of unknown version'} {lack}")
