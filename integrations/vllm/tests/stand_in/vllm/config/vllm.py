from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from vllm.config.compilation import CompilationConfig
from vllm.config.model import ModelConfig
from vllm.config.parallel import ParallelConfig

_current: VllmConfig | None = None


@dataclasses.dataclass
class VllmConfig:
    model_config: ModelConfig | None = dataclasses.field(default_factory=ModelConfig)
    compilation_config: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)
    parallel_config: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    graphs_sleep: bool = False

    @property
    def use_cumem_cudagraph_pool(self) -> bool:
        return self.graphs_sleep


def get_current_vllm_config_or_none() -> VllmConfig | None:
    return _current


@contextlib.contextmanager
def set_current_vllm_config(config: VllmConfig) -> Iterator[None]:
    global _current
    before, _current = _current, config
    try:
        yield
    finally:
        _current = before
