from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass
class ModelConfig:
    dtype: torch.dtype | str = "auto"
    hidden_size: int = 64

    def get_hidden_size(self) -> int:
        return self.hidden_size
