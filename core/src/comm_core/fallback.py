"""Core's fallback operations, for plugins that delegate some messages to them, and for comparisons."""

from __future__ import annotations

from comm_core._handle.fallback import add_rms_norm, torch_distributed
from comm_core._handle.quant import quantize

__all__ = ["add_rms_norm", "quantize", "torch_distributed"]
