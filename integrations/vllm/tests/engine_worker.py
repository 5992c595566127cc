"""What the engine's workers are asked: which communicator they have, and how often its handle was called."""

from __future__ import annotations

import functools
from typing import Any

import comm_core

_calls: list[str] = []


def _counted(name: str) -> Any:
    function = getattr(comm_core.Backend, name)

    @functools.wraps(function)  # with the attribute by which torch.compile traces the call
    def call(*args: Any, **kwargs: Any) -> Any:
        _calls.append(name)
        return function(*args, **kwargs)

    return call


for _name in ("all_reduce", "all_reduce_add_rms_norm"):
    setattr(comm_core.Backend, _name, _counted(_name))


class Counts:
    """An extension of vLLM's workers."""

    def describe_tensor_parallel(self) -> dict[str, Any]:
        from vllm.distributed.parallel_state import get_tp_group

        communicator = get_tp_group().device_communicator
        handle = getattr(communicator, "handle", None)
        return {
            "communicator": type(communicator).__name__,
            "backend": handle and handle.name,
            "calls": {name: _calls.count(name) for name in sorted(set(_calls))},
        }
