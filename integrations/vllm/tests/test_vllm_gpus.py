"""Groups of vLLM on two GPUs: the stand-in's, and the real ones of the releases that vllm_parts.py wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import parts_ranks
import pytest
import vllm_parts
from harness import Ranks
from vllm_ranks import STAND_IN

pytestmark = pytest.mark.gpus(2)
KINDS = ["stand_in", *vllm_parts.releases()]
Run = Callable[..., list[Any]]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A function that runs another on two GPUs, with vLLM of a kind; in new processes, as vLLM is imported once."""
    pools: list[Ranks] = []

    def call(function: Callable[..., Any], *arguments: Any, kind: str, **env: str) -> list[Any]:
        folder = tmp_path / f"pool{len(pools)}"
        folder.mkdir()
        pools.append(pool := Ranks(folder))
        path = STAND_IN if kind == "stand_in" else vllm_parts.FOLDER / kind
        settings = {"STAND_IN_PLATFORM": "cuda", "VLLM_DIST_IDENT": "comm-vllm-test", **env}
        return pool.run(
            function, *arguments, backend="cpu:gloo,cuda:nccl", env=settings, path=[[path]] * 2, installed=True
        )

    yield call
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_loop_sums_exactly(run: Run, kind: str) -> None:
    for found in run(parts_ranks.decode, 4, [1, 8, 64], kind=kind):
        assert (found["communicator"], found["buffers"]) == ("CommCudaCommunicator", [])
        assert found["backend"] is not None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind == "stand_in" or int(kind.split(".")[1]) >= 30])
def test_graphs_replay_after_a_sleep(run: Run, kind: str) -> None:
    assert run(parts_ranks.sleep_between_replays, kind=kind) == [True, True]


@pytest.mark.parametrize("kind", KINDS[1:] or ["stand_in"])
def test_the_time_of_both_is_printed(run: Run, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [2048 << (2 * power) for power in range(8)]
    ours = run(parts_ranks.time_graphs, sizes, 20, kind=kind)[0]
    stock = run(parts_ranks.time_graphs, sizes, 20, kind=kind, COMM_VLLM="0")[0]
    assert [*ours] == [*stock] == sizes
    with capsys.disabled():
        print(f"\nvLLM {kind}, us in a graph:      bytes   comm-vllm       vLLM")
        for nbytes in sizes:
            print(f"{nbytes:>32} {ours[nbytes]:>11.1f} {stock[nbytes]:>11.1f}")
