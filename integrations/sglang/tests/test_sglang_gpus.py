"""Groups of SGLang on two GPUs: the stand-in's, and the real ones of the releases that sglang_parts.py wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_gpu_ranks
import sglang_parts
import sglang_ranks
from harness import Ranks

pytestmark = pytest.mark.gpus(2)
KINDS = ["stand_in", *sglang_parts.releases()]
Run = Callable[..., list[Any]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A function that runs another on two GPUs, with SGLang of a kind; in new processes, as it is imported once."""
    pools: list[Ranks] = []

    def call(function: Callable[..., Any], *arguments: Any, kind: str, **env: str) -> list[Any]:
        folder = tmp_path / f"pool{len(pools)}"
        folder.mkdir()
        pools.append(pool := Ranks(folder))
        stand_in = kind == "stand_in"
        metadata = sglang_ranks.write_metadata(folder / "metadata", "0.5.23" if stand_in else kind)
        path = [metadata, sglang_ranks.STAND_IN if stand_in else sglang_parts.FOLDER / kind]
        # SGLang's own test of peer access asks for a server's group.
        env |= {"SGLANG_SKIP_P2P_CHECK": "1"}
        return pool.run(function, *arguments, backend="cpu:gloo,cuda:nccl", env=env, path=[path] * 2, installed=True)

    yield call
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_two_groups_sum_exactly(run: Run, kind: str) -> None:
    for found in run(sglang_gpu_ranks.decode, 1024, [1, 8, 64], kind=kind):
        assert found["backends"] != ["torch_distributed"] * 2
        assert found["stock"][:2] == ["CommAllReduce", "CustomAllReduceV2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_norm_is_fused(run: Run, kind: str) -> None:
    first, second = run(sglang_gpu_ranks.fuse_in_graph, 1024, 16, kind=kind)
    assert first == second != "torch_distributed"


@pytest.mark.parametrize("kind", KINDS[1:] or ["stand_in"])
def test_the_time_of_both_is_printed(run: Run, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [2048 << (2 * power) for power in range(7)]
    name, ours = run(sglang_gpu_ranks.time_graphs, sizes, 20, kind=kind)[0]
    stock_name, stock = run(sglang_gpu_ranks.time_graphs, sizes, 20, kind=kind, COMM_SGLANG="0")[0]
    assert (name, stock_name) == ("CommAllReduce", "CustomAllReduceV2")
    with capsys.disabled():
        print(f"\nSGLang {kind}, us in a graph:    bytes  comm-sglang  SGLang ({stock_name})")
        for nbytes in sizes:
            print(f"{nbytes:>32} {ours[nbytes]:>12.1f} {stock[nbytes]:>8.1f}")
