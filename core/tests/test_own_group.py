"""A candidate's own process group: its failures reach neither the terminal fallback nor the caller's own calls."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import own_group_ranks as plugins
import pytest
import torch
from harness import install
from own_group_ranks import (
    ask_in_threads,
    be_late,
    be_prepared,
    close_while_threads_wait,
    fall_back,
    live_often,
    resolve,
)
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from harness import Ranks

# For `connect` and for the admission test, in seconds: far more than they take.
ENV = {"COMM_CORE_CONNECT_TIMEOUT_S": "60", "COMM_CORE_CONTROL_TIMEOUT_S": "60"}
# Where a rank's fault shows by a missed deadline alone. Half of it is how long the others are waited for.
SHORT_ENV = ENV | {"COMM_CORE_CONNECT_TIMEOUT_S": "4"}


@pytest.fixture
def backend(tmp_path: Path) -> Any:
    """Install a class of own_group_ranks as the backend 'acme' of all ranks."""

    def make(kind: type[plugins.Summing], world_size: int, *arguments: Any) -> list[list[Path]]:
        source = f"import own_group_ranks\nplugin = own_group_ranks.{kind.__name__}(*{arguments!r})"
        return [[install(tmp_path / "acme", "acme", source)]] * world_size

    return make


def test_torch_still_has_what_makes_and_forgets_a_group() -> None:
    parameters = list(inspect.signature(distributed_c10d._new_process_group_helper).parameters)
    assert parameters[:6] == ["group_size", "group_rank", "global_ranks_in_group", "backend", "store", "group_name"]
    assert {"backend_options", "timeout", "pg_tag", "group_desc"} <= set(parameters)
    world = distributed_c10d._world
    for name in ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_to_tag", "tags_to_pg"):
        assert isinstance(getattr(world, name), dict)
    assert world.pg_names is distributed_c10d._pg_names
    assert callable(distributed_c10d._unregister_process_group)


# The first two calls sum one element, in one half; the next two sum many. See `admission_cases`.
@pytest.mark.parametrize(("when", "call"), [("before", 1), ("before", 6), ("between", 3), ("between", 4)])
def test_a_failed_admission_leaves_nothing_to_the_fallback(ranks: Ranks, backend: Any, when: str, call: int) -> None:
    path = backend(plugins.Summing, 2, when, call, [1])
    for verdict, wrong in ranks.run(fall_back, (0, 1), path=path, env=SHORT_ENV):
        assert verdict == ("failed", "admission: MemoryError: no room for a buffer", 1)
        assert wrong == []


@pytest.mark.parametrize("call", [1, 4])
def test_a_call_that_raises_after_its_messages_costs_only_its_kind(ranks: Ranks, backend: Any, call: int) -> None:
    path = backend(plugins.Summing, 2, "after", call, [1])
    for verdict, wrong in ranks.run(fall_back, (0, 1), path=path, env=ENV):
        assert verdict[0] == "serves"
        assert "failed on rank 1: MemoryError: no room for a buffer" in verdict[1]
        assert wrong == []


@pytest.mark.parametrize(("members", "faulty"), [((0, 1, 2), 2), ((2, 0), 0)])
def test_likewise_in_larger_and_sub_groups(ranks: Ranks, backend: Any, members: tuple[int, ...], faulty: int) -> None:
    path = backend(plugins.Summing, 3, "between", 3, [faulty])
    found = ranks.run(fall_back, members, world_size=3, path=path, env=SHORT_ENV)
    for verdict, wrong in filter(None, found):
        assert verdict == ("failed", "admission: MemoryError: no room for a buffer", sorted(members).index(faulty))
        assert wrong == []


def test_a_failed_connect_leaves_nothing_to_the_fallback(ranks: Ranks, backend: Any) -> None:
    path = backend(plugins.ConnectFails, 3, "", 0, [1])
    for verdict, wrong in ranks.run(fall_back, (0, 1, 2), world_size=3, path=path, env=ENV):
        assert verdict == ("failed", "OSError: the cable is loose", 1)
        assert wrong == []


def test_a_rank_that_fails_before_it_asks_releases_the_others(ranks: Ranks, backend: Any) -> None:
    path = backend(plugins.FailsWithoutAsking, 2, "", 0, [1])
    for verdict, wrong in ranks.run(fall_back, (0, 1), path=path, env=ENV | {"COMM_CORE_CONNECT_TIMEOUT_S": "600"}):
        assert verdict == ("failed", "OSError: the cable is loose", 1)
        assert wrong == []


def test_a_rank_that_doesnt_ask_is_named(ranks: Ranks, backend: Any) -> None:
    path = backend(plugins.AsksAlone, 2, "", 0, [1])
    found = ranks.run(fall_back, (0, 1), path=path, env=SHORT_ENV)
    assert found[0] == found[1]
    (verdict, reason, _), wrong = found[0]
    assert verdict == "failed"
    assert "rank 1 didn't come in time" in reason or "hasn't returned" in reason
    assert wrong == []


def test_a_failed_preparation_leaves_nothing_to_the_fallback(ranks: Ranks, backend: Any) -> None:
    path = backend(plugins.PreparationFails, 2, "", 0, [1])
    for before, verdict, after in ranks.run(be_prepared, path=path, env=ENV):
        assert before == after == []
        assert verdict == ("failed", "pre_capture_init: OSError: the cable is loose", 1)


def test_a_late_connect_frees_the_group(ranks: Ranks, backend: Any) -> None:
    path = backend(plugins.ConnectIsLate, 2, "", 0, [1])
    for (verdict, wrong), left in ranks.run(be_late, path=path, env=SHORT_ENV):
        assert verdict[0] == "failed"
        assert wrong == []
        assert left == {}


def test_a_kind_of_message_that_no_rank_can_sum_is_dropped_alone(ranks: Ranks, backend: Any) -> None:
    path = backend(plugins.Summing, 2)
    for verdict, wrong in ranks.run(fall_back, (0, 1), path=path, env=ENV):
        # Gloo doesn't sum int16.
        assert verdict[0] == "serves"
        assert "except for eager int16" in verdict[1]
        assert wrong == []


def test_closed_groups_leave_nothing_behind(ranks: Ranks, backend: Any) -> None:
    for verdicts, wrong, left in ranks.run(live_often, path=backend(plugins.Summing, 2), env=ENV):
        assert verdicts == {"serves"}
        assert wrong == []
        assert left == {}


def test_torchs_functions_know_the_group_and_later_groups_keep_their_names(ranks: Ranks, backend: Any) -> None:
    first, outside, third = ranks.run(resolve, world_size=3, path=backend(plugins.Summing, 3), env=ENV)
    assert first == third == ("serves", *[True] * 7, 1)
    assert outside is None


def test_threads_get_one_group_and_after_its_end_an_error(ranks: Ranks) -> None:
    said = "group of acme: there is no such group any more: its session is closed"
    assert ranks.run(ask_in_threads) == [(10, 1, 2.0, said)] * 2


def test_the_end_of_a_group_releases_the_threads_that_wait_in_it(ranks: Ranks) -> None:
    assert ranks.run(close_while_threads_wait) == [1, 0]


def test_a_context_asks_for_the_group_only_when_it_is_read() -> None:
    asked: list[str] = []
    make: Any = lambda: asked.append("asked") or "the group"  # noqa: E731
    arguments: Any = (0, 2, torch.device("cpu"), (4, 7), None, 1 << 20, 3.0)
    context = comm.GroupContext(make, *arguments)
    other = dataclasses.replace(context, group=make, rank=1)
    assert "the group" not in repr(context)
    assert context != other
    assert asked == []
    assert [context.group, other.group] == ["the group"] * 2
    assert asked == ["asked"] * 2
    plain: Any = "a group"
    assert comm.GroupContext(plain, *arguments).group == "a group"
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.group = plain  # type: ignore[misc]
