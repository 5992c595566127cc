"""The object in a communicator's `ca_comm`, by which vLLM's captures of CUDA graphs reach comm-core.

comm_core is imported late: on a rank where it can't be imported, vLLM's own communicator must still work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["CapturePoint"]

# vLLM enters the captures of several groups within each other; the outermost prepares every group.
_depth = 0


class NoCustomAllReduce:
    """Answers for vLLM's custom all-reduce where it wasn't created: it serves nothing."""

    disabled = True
    fully_connected = False
    mnnvl_lamport_ag_multicast_ptr = 0

    def should_custom_ar(self, _input: torch.Tensor) -> bool:
        """Return False."""
        return False

    def custom_all_reduce(self, _input: torch.Tensor) -> None:
        """Return None, on which callers sum by other means."""

    def custom_all_gather(self, _input: torch.Tensor) -> None:
        """Return None, on which callers gather by other means."""

    def custom_reduce_scatter(self, _input: torch.Tensor) -> None:
        """Return None, on which callers reduce and scatter by other means."""

    def capture(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()


class CapturePoint:
    """Enters `comm.capture()` where vLLM captures graphs, and otherwise is the stock object.

    Args:
        stock: vLLM's custom all-reduce; None if it wasn't created.
        config: vLLM's configuration (`VllmConfig`), with the shapes to prepare; None prepares none.
    """

    def __init__(self, stock: Any, config: Any) -> None:
        self._stock = NoCustomAllReduce() if stock is None else stock
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Prepare every group's backends, then let them record captured calls. Collective, as vLLM's own is.

        vLLM enters it twice in an engine's life: to measure the graphs' memory, and to capture them.

        Raises:
            CaptureError: as in `comm.capture()`.
        """
        global _depth  # noqa: PLW0603 - like the groups, one nesting a process
        if not _depth:
            self._prepare()
        _depth += 1
        try:
            with self._enter_groups(), self._stock.capture():
                yield
        finally:
            _depth -= 1

    def _prepare(self) -> None:
        if self._config is None or self._config.model_config is None:
            return
        max_tokens = self._config.compilation_config.max_cudagraph_capture_size
        model = self._config.model_config
        if max_tokens:
            import comm_core as comm

            comm.pre_capture_init(max_tokens=max_tokens, hidden_size=model.get_hidden_size(), dtype=model.dtype)

    def _enter_groups(self) -> contextlib.AbstractContextManager[None]:
        # Graphs in vLLM's cuMem pool move while the engine sleeps, so peers must not read their tensors. Outside of a
        # capture, backends use buffers of their own. vLLM older than 0.32 has no such pool.
        if self._config is not None and getattr(self._config, "use_cumem_cudagraph_pool", False):
            return contextlib.nullcontext()
        import comm_core as comm

        return comm.capture()
