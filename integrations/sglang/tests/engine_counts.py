"""A plugin of SGLang's, for the engine's test: writes how often each process called handles, into a folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

# How many calls the number in a rank's file may lag behind: SGLang ends its ranks without warning.
STRIDE = 50

_calls = 0


def register() -> None:
    import comm_core
    import torch.distributed as dist

    real = comm_core.Backend.all_reduce

    @functools.wraps(real)  # with the attribute by which torch.compile traces the call
    def all_reduce(*args: Any, **options: Any) -> Any:
        global _calls  # noqa: PLW0603 - one number a process
        _calls += 1
        if _calls % STRIDE == 0:
            (Path(os.environ["COMM_SGLANG_COUNTS"]) / f"rank{dist.get_rank()}").write_text(str(_calls))
        return real(*args, **options)

    comm_core.Backend.all_reduce = all_reduce  # type: ignore[method-assign]
