"""Handles used where their calls can't match the other ranks': in children, under modes, after errors, unequally."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import misuse_ranks
import pytest
from faulty_plugins import Good, install_kind

if TYPE_CHECKING:
    from harness import Ranks


@pytest.mark.parametrize("installed", [True, False], ids=["a backend", "torch.distributed"])
def test_a_forked_child_takes_no_turn(ranks: Ranks, tmp_path: Path, installed: bool) -> None:
    path = [[install_kind(tmp_path, Good, "first", 300)]] * 2 if installed else [[tmp_path]] * 2
    first, second = ranks.run(misuse_ranks.fork, path=path)
    assert first.pop("sums") == second.pop("sums") == [3.0, 5.0, 7.0]
    assert second == {}
    assert first.pop("get_backend").startswith("ValueError: this process inherited its process groups by a fork")
    assert first.pop("close") == "ok: None"
    assert len(first) == 5
    for text in first.values():
        assert text.startswith("CommError: group '")
        assert "this handle belongs to process" in text
        assert "or start this process with the method 'spawn'" in text


def test_a_handle_without_a_world_works_in_a_child(ranks: Ranks) -> None:
    assert ranks.run(misuse_ranks.fork_without_world, world_size=1) == ["ok: [1.0, 1.0]"]


@pytest.mark.parametrize("known", [False, True])
def test_calls_are_recorded_under_every_mode(ranks: Ranks, known: bool) -> None:
    for found in ranks.run(misuse_ranks.modes, known):
        for name in ("jit", "jit, fused"):
            kind, text = found.pop(name)
            assert (kind, text[:40]) == ("TypeError", "torch.jit.trace can't record a call of a")
        fakes = {name: found.pop(name) for name in ("a fake input", "a real input", "a real input, fused")}
        assert all(fakes.values()), fakes
        assert found.pop("afterwards") == 7.0
        assert {found.pop(name) for name in ("flop counter", "vmap")} == {"7.0"}
        assert len(found) == 18
        for name, value in found.items():
            assert value == "11.0", name


@pytest.mark.parametrize(("learns_by_check", "world_size"), [(False, 3), (True, 2)])
def test_a_backend_that_raises_on_one_rank_stops_all_ranks(
    ranks: Ranks, tmp_path: Path, learns_by_check: bool, world_size: int
) -> None:
    path = [[install_kind(tmp_path, misuse_ranks.Bursts, "first", 300, on=[1])]] * world_size
    found = ranks.run(misuse_ranks.burst, learns_by_check, world_size=world_size, path=path)
    words = "backend 'first' of group"
    for rank, ((kind, text), *later) in enumerate(found):
        assert words in text
        assert "failed in all_reduce: kernel burst" in text
        if rank != 1:
            assert "the handle of rank 1 stopped: " in text
            assert kind == ("CommError" if learns_by_check else "CommTimeoutError")
        assert [kind for kind, _ in later] == ["CommError"] * 2
        assert all("This handle refuses further calls" in text for _, text in later)


def test_a_handle_from_before_the_world_raises_once_there_is_one(ranks: Ranks) -> None:
    (found,) = ranks.run(misuse_ranks.before_the_world, world_size=1)
    (warning,) = found["warnings"]
    assert "before torch.distributed.init_process_group, though WORLD_SIZE=2" in warning
    assert found["alone"] == found["new"] == [1.0, 1.0]
    for name in ("later", "later, fused"):
        kind, text = found[name]
        assert kind == "CommError"
        assert "this handle was made before torch.distributed.init_process_group" in text
        assert "Call comm.get_backend() again" in text


HOW_THEY_DIFFER = {
    "size": "{1: 'all_reduce of tensor [13] float32 on cpu', others: 'all_reduce of tensor [12] float32 on cpu'}",
    "shape": "{1: 'all_reduce of tensor [4, 3] float32 on cpu'",
    "empty": "{1: 'all_reduce of tensor [0] float32 on cpu'",
    "dtype": "{1: 'all_reduce of tensor [12] int32 on cpu'",
    "out": "{1: 'all_reduce of tensor [12] float32 on cpu, out [7] float32 on cpu', others: ",
    "no tensor": "{1: 'all_reduce of ', others: ",
    "operation": "{1: 'all_reduce of tensor [3, 4] float32 on cpu', others: 'all_reduce_add_rms_norm of tens",
    "operator": "{1: 'all_reduce of tensor [11] float32 on cpu'",
}


@pytest.mark.parametrize("how", HOW_THEY_DIFFER)
@pytest.mark.parametrize("world_size", [3])
def test_calls_that_differ_are_compared_and_named(ranks: Ranks, how: str, world_size: int) -> None:
    found = ranks.run(misuse_ranks.differ, how, world_size=world_size, env={"COMM_CORE_DEBUG": "1"})
    for outcomes, absent in found:
        (first, second, third, last) = outcomes
        assert first == ("ok", f"[{float(world_size)}]")
        assert second[0] == "ok"
        assert third[0] == last[0] == "CommError"
        assert f"differs between the ranks: {HOW_THEY_DIFFER[how]}" in third[1]
        assert "All ranks must make the same calls in the same order" in last[1]
        assert absent == ()


@pytest.mark.parametrize("variable", [{"COMM_CORE_DEBUG": "1"}, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}])
def test_a_rank_that_makes_no_call_is_named(ranks: Ranks, variable: dict[str, str]) -> None:
    env = variable | {"COMM_CORE_WAIT_TIMEOUT_S": "3"}
    found: list[Any] = ranks.run(misuse_ranks.differ, "no call", world_size=3, env=env)
    # Rank 1 skipped its third call, so its fourth is compared with the others' third, and these wait for another one.
    assert [outcomes[2][0] for outcomes, _ in found] == ["ok"] * 3
    for rank in (0, 2):
        kind, text = found[rank][0][3]
        assert kind == "CommTimeoutError"
        assert "call 4" in text
        assert "rank 1 didn't come in time" in text


def test_equal_calls_are_let_through(ranks: Ranks) -> None:
    for outcomes, absent in ranks.run(misuse_ranks.differ, "nothing", env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}):
        assert [kind for kind, _ in outcomes] == ["ok"] * 4
        assert absent == ()
