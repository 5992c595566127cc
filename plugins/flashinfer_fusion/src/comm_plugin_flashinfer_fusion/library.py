"""What is used of FlashInfer: its unified all-reduce fusion with the backend "trtllm", which never takes multicast."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comm_core as comm
from packaging.version import Version

from comm_plugin_flashinfer_fusion.channel import Channel

if TYPE_CHECKING:
    import torch

__all__ = ["FLOOR", "Library", "installed", "load", "missing"]

#: As in pyproject.toml.
FLOOR = "0.7.1"
_DISTRIBUTION = "flashinfer-python"
# The arguments of its two functions that are used here.
_CREATE = {"backend", "world_size", "rank", "max_token_num", "hidden_dim", "dtype", "comm_backend", "group"}
_FUSE = {
    *("input", "workspace", "pattern", "launch_with_pdl", "output", "residual_out", "norm_out", "residual_in"),
    *("rms_gamma", "rms_eps", "use_oneshot", "fp32_acc", "weight_bias"),
}


def installed() -> str | None:
    """The version of FlashInfer's distribution; None where there is none, or a package without one."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> str | None:
    """Why FlashInfer can't be used here, one sentence without a full stop, or None. Imports nothing."""
    if importlib.util.find_spec("flashinfer") is None:
        return f"flashinfer isn't installed: pip install '{_DISTRIBUTION}>={FLOOR}'"
    version = installed()
    if version is not None and Version(version) < Version(FLOOR):
        return f"{_DISTRIBUTION} {version} is older than {FLOOR}"
    return None


class Library:
    """FlashInfer's functions, looked up and found to take what is given to them.

    Args:
        module: `flashinfer.comm`.
        details: `flashinfer.comm.trtllm_ar`.
    """

    def __init__(self, module: Any, details: Any) -> None:
        self._create = _function(module, "create_allreduce_fusion_workspace", _CREATE)
        self._fuse = _function(module, "allreduce_fusion", _FUSE)
        self._pattern = int(module.AllReduceFusionPattern.kARResidualRMSNorm)
        self._forget = getattr(details, "trtllm_destroy_ipc_workspace_for_all_reduce_fusion", None)
        # Where it keeps alive what a workspace is made of. Without it nothing is kept.
        self._kept: dict[int, Any] = getattr(details, "_symm_workspace_refs", {})

    def create(self, context: comm.GroupContext, tokens: int, hidden_size: int, dtype: torch.dtype) -> Any:
        """A workspace for messages of as many elements as `[tokens, hidden_size]` has. Collective.

        Raises:
            CommError: another rank failed.
            RuntimeError: this one did; what it had taken is free again.
        """
        before = set(self._kept)
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
            for key in set(self._kept) - before:
                del self._kept[key]
            # Its frames hold buffers for as long as somebody holds the error.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, comm.CommError):
                raise
            shape, words = f"[{tokens}, {hidden_size}]", f"{type(error).__name__}: {error}"
            raise RuntimeError(f"FlashInfer couldn't make a workspace for messages of {shape}: {words}") from None

    def destroy(self, workspace: Any) -> None:
        """Free a workspace that no kernel uses any more. Local; the caller lets go of it too."""
        handles = getattr(workspace, "ipc_handles", None)
        if self._forget is not None and handles is not None:
            self._forget(handles)
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
        """One-shot all-reduce, residual and norm on the current stream; sums over ranks in fp32."""
        self._fuse(
            input=tensor,
            workspace=workspace,
            pattern=self._pattern,
            launch_with_pdl=True,
            # Not written to in this pattern, but allocated where there is none.
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
    """Import FlashInfer and build its kernels. Local; takes minutes where they are in no cache.

    Raises:
        RuntimeError: this host, or this release of FlashInfer, has no workspace that is safe to use.
        Exception: whatever its import, or its build, raises.
    """
    module: Any = importlib.import_module("flashinfer.comm")
    details: Any = importlib.import_module("flashinfer.comm.trtllm_ar")
    library = Library(module, details)
    confidential = getattr(importlib.import_module("flashinfer.utils"), "is_confidential_compute", None)
    if confidential is not None and confidential():
        # There it takes torch's symmetric memory instead of its own, and with it a multicast object.
        raise RuntimeError("under confidential computing FlashInfer's workspace would take NVLink multicast")
    build = getattr(details, "get_trtllm_comm_module", None)
    if build is not None:
        build()
    return library


def _function(module: Any, name: str, arguments: set[str]) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(module, name, None) or _unknown(f"has no flashinfer.comm.{name}")
    parameters = inspect.signature(function).parameters
    lacking = sorted(arguments - set(parameters))
    if lacking and not any(value.kind is value.VAR_KEYWORD for value in parameters.values()):
        _unknown(f"has a flashinfer.comm.{name} without {', '.join(lacking)}")
    return function


def _unknown(what: str) -> Any:
    raise RuntimeError(f"{_DISTRIBUTION} {installed() or 'of unknown version'} {what}")
