"""`comm-core tune` on two GPUs: a table of every mode, and rules and variants that a later job follows."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest
import torch
import torch.distributed as dist
from comm_bench.cases import OPS
from comm_core._native import cache
from comm_core.env import Settings
from comm_core.tuned import TunedTable
from comm_core.tuning import VariantChoice, parse_rules
from comm_core.types import MODES
from kernel_ranks import opened, random_bits, reference, same

if TYPE_CHECKING:
    from harness import Ranks

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


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the kernels that are built already, and without a tuned table."""
    folder, top = tmp_path_factory.mktemp("user") / "cache", cache.root(Settings.read().cache_dir)
    if top.is_dir():
        shutil.copytree(top, folder, ignore=shutil.ignore_patterns("tuned", "running", "lock"))
    return folder


@pytest.mark.timeout(900)
def test_everything_is_measured_and_a_later_group_follows_the_table(cache_dir: Path) -> None:
    env = {"COMM_CORE_CACHE_DIR": str(cache_dir)}
    done = command(env, "tune", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    text = importlib.resources.files("comm_bench").joinpath("table_schema.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator(json.loads(text)).validate(data)
    (file,) = (cache_dir / "tuned").iterdir()
    assert json.loads(file.read_text()) == data
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
    variants = data["provenance"]["variants"]
    assert {each["op"] for each in variants["customar_v2"]} == set(OPS[:2])
    assert {each["mode"] for of_backend in variants.values() for each in of_backend} == {"graph"}
    failed = [each for each in data["provenance"]["dropped"] if ":" in each["name"]]
    assert not failed, failed
    explained = command(env, "explain", "--nproc", "2")
    assert explained.returncode == 0, explained.stderr
    assert f"the tuned table {TunedTable.from_json(data).digest[:8]}" in explained.stdout
    for name, choices in TunedTable.from_json(data).variants.items():
        assert f"Variants of {name} that this table chooses:" in explained.stdout
        assert all(f"  {choice}\n" in explained.stdout for choice in choices)


# Bytes of plain messages, shapes of fused ones.
SIZES = (4, 1024, 8190, (96 << 10) + 12, 1 << 20, (6 << 20) + 14, (33 << 20) + 2)
SHAPES = ((1, 2880), (2, 4096), (33, 5120), (300, 8192))


def sum_by_every_variant(name: str) -> dict[str, int]:
    """Compare the bits of every variant's results; return the number of variants by message."""
    rank, counts = dist.get_rank(), dict[str, int]()
    with opened(name) as handle:
        for nbytes in SIZES:
            numel, texts = nbytes // 2, handle.variants("all_reduce", nbytes).get(name, ())
            x, other = (random_bits(each, numel * 2, torch.bfloat16) for each in (rank, 1 - rank))
            expected = reference([x, other] if rank == 0 else [other, x])
            for text in texts:
                handle.use_variants({name: (VariantChoice("all_reduce", text),)})
                for _ in range(3):
                    assert same(handle.all_reduce(x), expected), f"{nbytes} bytes by {text}"
            counts[str(nbytes)] = len(texts)
        for shape in SHAPES:
            texts = handle.variants(OPS[1], 2 * shape[0] * shape[1], shape[0]).get(name, ())
            generator = torch.Generator(device="cuda").manual_seed(7)
            x, residual, weight = (
                torch.randn(size, device="cuda", generator=generator).to(torch.bfloat16)
                for size in (shape, shape, shape[1:])
            )
            expected_pair = None
            for text in texts:
                handle.use_variants({name: (VariantChoice(OPS[1], text),)})
                pair = handle.all_reduce_add_rms_norm(x * (rank + 1), residual, weight)
                expected_pair = expected_pair or pair
                assert all(map(torch.equal, pair, expected_pair)), f"{shape} by {text}"
            counts[str(shape)] = len(texts)
        handle.use_variants({name: ()})
    return counts


@pytest.mark.parametrize("name", ["customar_v2", "customar_v1"])
def test_sums_have_the_same_bits_by_every_variant(ranks: Ranks, name: str) -> None:
    first, second = ranks.run(sum_by_every_variant, name, backend="cpu:gloo,cuda:nccl", installed=True, deadline_s=240)
    assert first == second
    assert first["1024"] > 3
    assert name == "customar_v1" or min(first.values()) > 3, first


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
