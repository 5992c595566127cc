"""vLLM's tensor-parallel all-reduces by the backends of comm-core; vLLM finds this package by its entry point."""

from comm_vllm.door import register

__all__ = ["register"]
