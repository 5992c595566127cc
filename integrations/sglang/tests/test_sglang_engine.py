"""SGLang's real engine on CPUs, with its own all-reduces and with this package's; `make test-sglang` runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang_parts
from engine_counts import STRIDE

HERE = Path(__file__).parent
DEADLINE_S = 600

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None, reason="SGLang isn't installed here: make test-sglang"
    ),
    pytest.mark.timeout(2 * DEADLINE_S),
]


def run_engine(folder: Path, name: str, **environ: str) -> dict[str, Any]:
    """Run the engine in a process of its own; runs share the model."""
    support, counts, result = folder / "support", folder / f"{name}-counts", folder / f"{name}.json"
    counts.mkdir()
    info = support / "engine_counts-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-counts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\ncounts = engine_counts:register\n")
    (support / "missing_packages.py").write_text(sglang_parts.MISSING_PACKAGES)
    (support / "sitecustomize.py").write_text("import missing_packages\n")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("COMM_", "SGLANG_"))}
    settings = {
        "COMM_SGLANG_COUNTS": str(counts),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(support), str(HERE), os.environ.get("PYTHONPATH")])),
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        "SGLANG_USE_CPU_ENGINE": "1",
    }
    log = folder / f"{name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, HERE / "sglang_engine.py", folder / "model", result],
            env=inherited | settings | environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_S,
            check=False,
        )
    text = log.read_text()
    assert result.exists(), f"exit status {done.returncode}\n{text[-6000:]}"
    found: dict[str, Any] = json.loads(result.read_text())
    return found | {"log": text, "calls": {path.name: int(path.read_text()) for path in sorted(counts.iterdir())}}


def test_the_engine_generates_the_same_tokens_by_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {name: run_engine(tmp_path, name, COMM_SGLANG=str(int(name == "core"))) for name in ("stock", "core")}
    with capsys.disabled():
        for name, run in runs.items():
            print(f"\n{name}: {run['tokens_per_s']} tokens/s, calls {run['calls']}", end="")
    for name, run in runs.items():
        assert run["tokens"] == runs["stock"]["tokens"], name
        if name == "stock":
            assert run["calls"] == {}
        else:
            # Two layers with two sums each, and the embedding's, in each step of four generations.
            assert [*run["calls"]] == ["rank0", "rank1"]
            assert run["calls"]["rank0"] == run["calls"]["rank1"] >= 5 * 64 * 4 - STRIDE
    assert len({token for tokens in runs["stock"]["tokens"] for token in tokens}) > 20, "the model repeats itself"
    assert "group 'tp:0': all-reduces by comm-core" in runs["core"]["log"]
    assert "comm-core" not in runs["stock"]["log"]
