"""The fused pass under the real vLLM's pattern matcher, on CPUs; `make test-vllm` runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import fused_ranks
import pytest
from harness import Ranks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM isn't installed here: make test-vllm"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def fresh_ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Processes of their own, since vLLM keeps its groups and settings for a process's life."""
    pool = Ranks(tmp_path)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    fused_ranks.make_model(folder)
    return str(folder)


def test_every_sum_before_a_norm_is_fused(fresh_ranks: Ranks, model: str) -> None:
    cases = [
        ("float32", False, 1e-6),
        ("float32", False, 1e-5),
        ("bfloat16", False, 1e-5),
        ("bfloat16", True, 1e-6),
        ("float32", False, 1e-3),
    ]
    for found in fresh_ranks.run(fused_ranks.fuse, model, cases, installed=True, deadline_s=500):
        fused, unknown = found[:4], found[4]
        assert [(matches, calls) for matches, calls, _ in fused] == [(2, 2)] * 4, found
        assert max(difference for *_, difference in fused[:2]) < 1e-5
        assert max(difference for *_, difference in fused) < 2e-2
        assert unknown[:2] == (0, 0), "an epsilon that no pattern has"


def test_the_pass_takes_the_place_of_flashinfers(fresh_ranks: Ranks, model: str) -> None:
    for ours, refused, without in fresh_ranks.run(fused_ranks.configure, model, installed=True, deadline_s=500):
        assert ours == ["CommAllReduceFusionPass"]
        assert refused == without == ["StockPass"]
