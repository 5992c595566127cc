"""The part that both communicators share: a handle, and what vLLM does with a group besides calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comm_vllm import compiled

if TYPE_CHECKING:
    import comm_core as comm
    import torch.distributed as dist

    # A communicator of vLLM, which has no type information.
    _Stock = Any
else:
    _Stock = object

__all__ = ["CommCommunicator"]


class CommCommunicator(_Stock):  # type: ignore[misc]
    """Mixed in before a communicator of vLLM: gives its memory back in a sleep, and closes its handle.

    Attributes:
        handle: the group's handle; None on all ranks if vLLM's own all-reduce serves the group.
    """

    handle: comm.Backend | None = None
    device_group: dist.ProcessGroup
    unique_name: str

    def suspend(self) -> None:
        """Give memory back while the engine sleeps. vLLM 0.30 and newer call it, on all ranks."""
        super().suspend()
        if self.handle is not None:
            import comm_core as comm

            comm.suspend(self.device_group)

    def resume(self) -> None:
        """Take the memory again that `suspend` gave back."""
        if self.handle is not None:
            import comm_core as comm

            comm.resume(self.device_group)
        super().resume()

    def destroy(self) -> None:
        """Close the handle, which waits `COMM_CORE_CONTROL_TIMEOUT_S` at most for a peer, then the communicator."""
        handle, self.handle = self.handle, None
        if handle is not None:
            import comm_core as comm

            compiled.forget(self.unique_name)
            comm.close(self.device_group)
        super().destroy()
