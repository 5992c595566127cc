"""`comm-core tune` on two GPUs: a table of every mode, and rules that a later job follows."""

from __future__ import annotations

import importlib.resources
import json
import os
import subprocess
import sys
from collections.abc import Mapping

import jsonschema
import pytest
from comm_bench.cases import OPS
from comm_core.tuning import parse_rules
from comm_core.types import MODES

pytestmark = pytest.mark.gpus(2)


def command(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "comm_core", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.timeout(900)
def test_every_mode_and_operation_is_measured_and_the_rules_are_readable() -> None:
    done = command({}, "tune", "--quick", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    text = importlib.resources.files("comm_bench").joinpath("table_schema.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator(json.loads(text)).validate(data)
    assert data["group"]["device_types"] == ["cuda", "cpu"]
    assert data["provenance"]["wrong"] == 0
    measured = data["provenance"]["measured"]
    assert {(each["op"], each["mode"]) for each in measured} == {(op, mode) for op in OPS[:2] for mode in MODES}
    assert all(each["planned"] in each["times_us"] for each in measured)
    for rule in parse_rules(",".join(data["rules"]) or "none"):
        assert rule.device_type == "cuda"
        concerned = [
            each
            for each in measured
            if (each["op"], each["mode"]) == (rule.op, rule.mode)
            and rule.min_nbytes <= each["nbytes"] <= (rule.max_nbytes or 1 << 40)
        ]
        assert concerned
        assert all(rule.backend in each["times_us"] for each in concerned)


@pytest.mark.parametrize("mode", MODES)
def test_a_rule_decides_on_gpus(mode: str) -> None:
    rule = f"nccl:all_reduce:1M-inf:{mode}:cuda:inf"
    for nbytes, words in (("1M", f": nccl (by the rule {rule})"), ("512K", ": ")):
        done = command(
            {"COMM_CORE_TUNE": rule}, "explain", "--nproc", "2", "--size", nbytes, "--mode", mode, "--device", "cuda"
        )
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        assert (rule in done.stdout) == (nbytes == "1M")
