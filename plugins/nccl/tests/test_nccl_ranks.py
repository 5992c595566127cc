"""The session in real processes, over a fake binding; and the plugin without a GPU."""

from __future__ import annotations

from pathlib import Path

import nccl_ranks
import pytest
from harness import DEAD, Ranks, install_entry_point


@pytest.fixture
def found(tmp_path: Path) -> Path:
    return install_entry_point(tmp_path, "nccl_ranks:plugin", "nccl")


def test_a_communicator_for_each_group(ranks: Ranks, found: Path) -> None:
    results = ranks.run(nccl_ranks.groups_and_places, world_size=3, path=[[found]] * 3)
    for rank, result in enumerate(results):
        groups = [(3, rank)] if rank == 1 else [(3, rank), (2, rank // 2)]
        assert result == [[("init", *group), "destroy"] for group in groups]


def test_errors_have_nccls_text_and_end_the_session(ranks: Ranks, found: Path) -> None:
    for rank, texts in enumerate(ranks.run(nccl_ranks.errors_by_name, path=[[found]] * 2)):
        assert len(texts) == (4 if rank == 0 else 3)
        assert "backend 'nccl'" in texts[0]
        assert "failed in all_reduce: NCCL: InvalidUsage (5) (too many of them)" in texts[0]
        for text in texts[1:]:
            assert "NCCL: remote process exited or there was a network error (socket closed)" in text


def test_a_peer_that_dies_ends_the_wait_and_is_named(ranks: Ranks, found: Path) -> None:
    results = ranks.run(nccl_ranks.killed_peer, world_size=3, path=[[found]] * 3, dying=[1])
    assert results[1] == DEAD
    for rank in (0, 2):
        assert "rank 1, process" in results[rank]["text"]
        assert "has ended" in results[rank]["text"]
        assert results[rank]["ranks"] == (1,)
        assert results[rank]["calls"] == [("init", 3, rank), "abort"]


def test_a_peer_whose_call_raises_ends_the_wait_and_is_named(ranks: Ranks, found: Path) -> None:
    for rank, result in enumerate(ranks.run(nccl_ranks.stopped_peer, world_size=3, path=[[found]] * 3)):
        assert "NCCL: its fault" in result["text"] if rank == 1 else "rank 1" in result["text"], result
        assert result["calls"] == [("init", 3, rank), "abort"]


def test_without_a_gpu_the_reason_says_so_and_the_fallback_serves(ranks: Ranks, tmp_path: Path) -> None:
    found = install_entry_point(tmp_path, "comm_plugin_nccl", "nccl")
    for result in ranks.run(nccl_ranks.fallback_serves, path=[[found]] * 2):
        assert result["name"] == "torch_distributed"
        assert result["verdict"] == "unavailable"
        assert result["reason"] == "it sums CUDA tensors, and this group has none"
        assert result["reason"] in result["explains"]
