"""SGLang's all-reduces by the backends of comm-core; SGLang finds this package by its entry point."""

from comm_sglang.door import register

__all__ = ["register"]
