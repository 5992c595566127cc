"""Local hooks run under a deadline: one that hangs fails, by its name, and keeps no rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import faulty_plugins as faulty
import leaving_ranks
import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from harness import Ranks

ENV = {
    "COMM_CORE_CONTROL_TIMEOUT_S": "20",
    "COMM_CORE_CONNECT_TIMEOUT_S": "8",
    "COMM_CORE_WAIT_TIMEOUT_S": "4",
}


def install(tmp_path: Path, point: str, way: str) -> list[Path]:
    """Folders with the backend 'first', whose fault is on rank 1, and with 'second'."""
    second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
    return [leaving_ranks.install_leaver(tmp_path, "first", 300, on=1, point=point, way=way), second]


@pytest.mark.parametrize(
    ("point", "hook"),
    [("probe", "probe of first"), ("is_available", "is_available of first"), ("memory", "memory_nbytes of first")],
)
def test_a_hook_that_hangs_drops_its_backend(ranks: Ranks, tmp_path: Path, point: str, hook: str) -> None:
    results = ranks.run(leaving_ranks.get_and_explain, path=[install(tmp_path, point, "hangs")] * 2, env=ENV)
    assert results[0] == results[1]
    candidate, name = results[0]
    assert (candidate.rank, name) == (1, "second")
    assert f"{hook} hasn't returned after" in candidate.reason


@pytest.mark.parametrize("way", ["hangs", "exits", "raises KeyboardInterrupt"])
def test_a_close_that_fails_keeps_nothing_else_open(ranks: Ranks, tmp_path: Path, way: str) -> None:
    results = ranks.run(leaving_ranks.close_two, path=[install(tmp_path, "close", way)] * 2, env=ENV)
    for rank, found in enumerate(results):
        interrupted = rank == 1 and way == "raises KeyboardInterrupt"
        assert found["ending"][0] == ("KeyboardInterrupt" if interrupted else "ok")
        assert found["names"] == ["first", "second"]
        assert found["keys"]
    texts = " ".join(results[1]["texts"])
    if way == "hangs":
        assert "close of first hasn't returned after 4 s" in texts
    if way == "exits":
        assert "'first' raised in close" in texts


@pytest.mark.parametrize("point", ["capture_ctx, enter", "capture_ctx, exit"])
def test_a_capture_context_that_hangs_fails_the_capture(ranks: Ranks, tmp_path: Path, point: str) -> None:
    results = ranks.run(leaving_ranks.capture_once, path=[install(tmp_path, point, "hangs")] * 2, env=ENV)
    for first, second in results:
        assert first[0] in {"CaptureError", "CommTimeoutError"}
        assert second == ("ok", "", ())
    if point == "capture_ctx, enter":
        assert "enter of capture_ctx of first hasn't returned after 4 s" in results[0][0][1]
        assert "enter of capture_ctx of first hasn't returned after 4 s" in results[1][0][1]
