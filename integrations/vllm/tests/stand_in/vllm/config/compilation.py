from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class PassConfig:
    fuse_allreduce_rms: bool | None = None


@dataclasses.dataclass
class CompilationConfig:
    max_cudagraph_capture_size: int | None = None
    pass_config: PassConfig = dataclasses.field(default_factory=PassConfig)
