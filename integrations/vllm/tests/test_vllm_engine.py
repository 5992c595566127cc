"""vLLM's real engine on CPUs, with its own communicators and with this package's; `make test-vllm` runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
DEADLINE_S = 600

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM isn't installed here: make test-vllm"),
    pytest.mark.timeout(4 * DEADLINE_S),
]


def run_engine(folder: Path, name: str, **environ: str) -> dict[str, Any]:
    """Run the engine in a process of its own; runs share the model and vLLM's cache of compiled graphs."""
    result = folder / f"{name}.json"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("COMM_", "VLLM_"))}
    settings = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = folder / f"{name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, HERE / "engine.py", folder / "model", result],
            env=inherited | settings | environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_S,
            check=False,
        )
    text = log.read_text()
    assert done.returncode == 0, text[-6000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found | {"log": text}


def test_the_engine_generates_the_same_tokens_by_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Twice each, in turn: the later runs load compiled graphs from vLLM's cache, and must load their own.
    names = ("stock", "core", "stock_again", "core_again")
    runs = {name: run_engine(tmp_path, name, COMM_VLLM=str(int(name.startswith("core")))) for name in names}
    with capsys.disabled():
        for name, run in runs.items():
            print(f"\n{name}: {run['tokens_per_s']} tokens/s, {run['workers']}", end="")
    for name, run in runs.items():
        assert run["tokens"] == runs["stock"]["tokens"], name
        assert len(run["workers"]) == 2
        for worker in run["workers"]:
            if name.startswith("stock"):
                assert (worker["communicator"], worker["calls"]) == ("CpuCommunicator", {})
            else:
                assert worker["communicator"] == "CommCpuCommunicator"
                assert worker["calls"] == run["workers"][0]["calls"]
                # Two layers with two sums each, and the embedding's, in each of the steps of six generations.
                assert worker["calls"]["all_reduce"] >= 5 * 128 * 6
    assert len({token for tokens in runs["stock"]["tokens"] for token in tokens}) > 20, "the model repeats itself"
    assert "group 'tp:0': all-reduces by comm-core" in runs["core"]["log"]
    assert "comm_vllm" not in runs["stock"]["log"]
