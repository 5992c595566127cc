"""What runs in the ranks for test_stats.py."""

from __future__ import annotations

from typing import Any

import comm_core as comm
import torch
import torch.distributed as dist

#: The number of calls with each size, in elements.
CALLS = {2: 3, 64: 40, 4096: 1}


def count() -> dict[str, Any]:
    """Call, prepare, call again, close; return what the handle counted, and the sums' rightness."""
    backend = comm.get_backend()
    stats, right = [backend.stats()], []
    silent = backend.explain()

    def call() -> None:
        for numel, calls in CALLS.items():
            for _ in range(calls):
                total = backend.all_reduce(torch.full((numel,), dist.get_rank() + 1.0))
                right.append(bool((total == 3).all()))
        # Taken by torch.distributed alone, of no route.
        right.append(bool(backend.all_reduce(torch.ones(5, dtype=torch.bool)).all()))
        x = torch.full((2, 8), dist.get_rank() + 1.0)
        for _ in range(20):
            _, residual = backend.all_reduce_add_rms_norm(x, torch.zeros_like(x), torch.ones(8))
            right.append(bool((residual == 3).all()))

    call()
    stats.append(backend.stats())
    comm.pre_capture_init(max_tokens=4, hidden_size=8, dtype=torch.float32)
    stats.append(backend.stats())
    call()
    explained = backend.explain()
    comm.close()
    stats.append(backend.stats())
    return {"stats": stats, "right": right, "silent": silent, "explained": explained}
