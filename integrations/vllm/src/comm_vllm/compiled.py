"""Keep the graphs that vLLM compiled with comm-core's operators apart from others in its cache."""

from __future__ import annotations

import os
from typing import Any

from vllm import envs

__all__ = ["distinguish", "forget", "fuses"]

_VARIABLE = "COMM_VLLM"
_operators: dict[str, str] = {}


def distinguish(group: str, operator: str, group_name: str) -> None:
    """Add an operator that compiled graphs call to the key of vLLM's cache of compiled graphs.

    vLLM loads a graph of an earlier run before it traces anything, by a key of its settings. Otherwise a run without a
    handle would load a graph that needs one.

    Args:
        group: vLLM's name of the group, such as "tp:0".
        operator: the operator's name in `torch.ops.comm_core`.
        group_name: torch's name of the group, which the graphs pass to the operator.
    """
    # Without the number in vLLM's name, which counts up with every engine of the process.
    _operators[group] = f"{group.partition(':')[0]} {operator} {group_name}"
    envs.environment_variables[_VARIABLE] = _describe


def forget(group: str) -> None:
    """Take a group's operator out of the key again; later engines of this process may load its graphs."""
    _operators.pop(group, None)
    if not _operators:
        envs.environment_variables.pop(_VARIABLE, None)


def fuses(config: Any) -> bool:
    """Return whether `config` (`VllmConfig`) asks for fused all-reduces, and the environment doesn't refuse core's."""
    return bool(config.compilation_config.pass_config.fuse_allreduce_rms) and (
        os.environ.get("COMM_VLLM_FUSED", "1").strip() != "0"
    )


def _describe() -> str:
    return ", ".join(sorted(_operators.values()))
