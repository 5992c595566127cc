"""What the engine's workers are asked: which communicator they have, and how often its handle was called."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Counts:
    """An extension of vLLM's workers."""

    def describe_tensor_parallel(self) -> dict[str, Any]:
        from vllm.distributed.parallel_state import get_tp_group

        communicator = get_tp_group().device_communicator
        handle = getattr(communicator, "handle", None)
        calls = Counter[str]()
        for route in handle.stats() if handle is not None else ():
            calls[route.op] += route.calls
        return {
            "communicator": type(communicator).__name__,
            "backend": handle and handle.name,
            "calls": dict(calls),
        }
