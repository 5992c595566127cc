"""The protocol's memory order: ranks are threads, under ThreadSanitizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CXX = os.environ.get("CXX", "c++")


def csrc() -> Path:
    spec = importlib.util.find_spec("comm_plugin_shm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "csrc"


def build(source: Path, headers: Path, target: Path, *flags: str) -> Path:
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler ({CXX}) on this machine")
    command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, f"-I{headers}", str(source), "-o", str(target)]
    done = subprocess.run([*command, "-pthread"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    # Newer kernels randomise more address bits than older sanitizers support; without randomisation they start.
    no_randomisation = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    return subprocess.run(
        [*no_randomisation, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env=environ,
        check=False,
    )


def test_every_access_is_ordered(tmp_path: Path) -> None:
    done = run(build(HERE / "threads.cpp", csrc(), tmp_path / "threads", "-O1", "-g", "-fsanitize=thread"), "300")
    assert done.returncode == 0, done.stderr
    assert "every sum is right" in done.stdout


@pytest.mark.parametrize(
    ("order", "weaker"),
    [
        ("mine.step.store(++step_, std::memory_order_seq_cst)", "mine.step.store(++step_, std::memory_order_relaxed)"),
        ("step.load(std::memory_order_acquire)", "step.load(std::memory_order_relaxed)"),
    ],
)
def test_a_weaker_order_is_found(tmp_path: Path, order: str, weaker: str) -> None:
    """The test above can fail: it does when the protocol is weakened."""
    headers = tmp_path / "csrc"
    shutil.copytree(csrc(), headers)
    text = (headers / "protocol.h").read_text()
    assert order in text
    (headers / "protocol.h").write_text(text.replace(order, weaker))
    done = run(build(HERE / "threads.cpp", headers, tmp_path / "threads", "-O1", "-g", "-fsanitize=thread"), "300")
    assert "data race" in done.stderr, done.stderr


def test_without_the_sanitizer(tmp_path: Path) -> None:
    done = run(build(HERE / "threads.cpp", csrc(), tmp_path / "threads", "-O3"), "1500")
    assert done.returncode == 0, done.stderr
