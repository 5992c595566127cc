from __future__ import annotations

import os


def is_confidential_compute() -> bool:
    return os.environ.get("FAKE_CONFIDENTIAL") == "1"
