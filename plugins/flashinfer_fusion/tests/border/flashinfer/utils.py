from __future__ import annotations

import os


def is_confidential_compute() -> bool:
    return os.environ.get("BORDER_CONFIDENTIAL") == "1"
