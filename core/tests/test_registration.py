"""Graph inputs' registration: threads as ranks, the real control channel, and memory that each has for itself."""

from __future__ import annotations

import random
from pathlib import Path

import comm_core as comm
import pytest
from comm_core import _inputs, registration
from made_up_memory import FABRIC, FILE, IPC, Group


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def place(rank: int) -> int:
    """Every rank's memory is elsewhere."""
    return (1 + rank) << 32


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_finds_every_input(world_size: int) -> None:
    group = Group(world_size)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 1 << 20)
        space.allocate(place(rank) + (1 << 24), 4096 * (1 + rank))

    def inputs(rank: int) -> list[tuple[int, int]]:
        # Two calls with one address; and whose allocations differ from rank to rank.
        second = place(rank) + (1 << 24)
        return [(place(rank) + 512 * rank, 1024), (second, 64), (place(rank) + 512 * rank, 16), (second + 16, 4080)]

    everyone = group.capture(inputs)
    for rank, tags in enumerate(everyone):
        assert isinstance(tags, list), tags
        assert [tag & 0xFFFFF for tag in tags] == [0, 1, 2, 3]
        assert len(set(tags)) == 4
        for call, tag in enumerate(tags):
            group.check(rank, tag, [inputs(peer)[call][0] for peer in range(world_size)])
        # Each allocation of each peer is opened once, however many calls read it.
        assert group.spaces[rank].log.count("open") == 2 * (world_size - 1)
        assert group.spaces[rank].log.count("share") == 2


def test_a_later_capture_opens_only_what_is_new() -> None:
    group = Group(2)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096)
        space.allocate(place(rank) + 8192, 4096)
    first = group.capture(lambda rank: [(place(rank), 16)])
    second = group.capture(lambda rank: [(place(rank) + 32, 16), (place(rank) + 8192, 16)])
    for rank in range(2):
        tags = [*first[rank], *second[rank]]  # type: ignore[misc]
        assert [tag & 0xFFFFF for tag in tags] == [0, 1, 2]
        for tag, offset in zip(tags, (0, 32, 8192), strict=True):
            group.check(rank, tag, [place(peer) + offset for peer in range(2)])
        assert group.spaces[rank].log.count("open") == 2
        assert group.spaces[rank].log.count("share") == 2


@pytest.mark.parametrize("sharing", [FILE, FABRIC])
def test_a_tensor_in_several_pieces_is_mapped_side_by_side(sharing: int) -> None:
    group = Group(3)
    for rank, space in enumerate(group.spaces):
        for number in range(4):
            space.allocate(place(rank) + number * 4096, 4096, sharing)
    before = open_files()

    def inputs(rank: int) -> list[tuple[int, int]]:
        # In the second and third; in the third alone; in three, for each rank elsewhere.
        return [(place(rank) + 5000, 6000), (place(rank) + 8192, 16), (place(rank) + 16 * rank, 9000)]

    for _ in range(2):
        for rank, tags in enumerate(group.capture(inputs)):
            assert isinstance(tags, list), tags
            for call, tag in enumerate(tags):
                group.check(rank, tag, [inputs(peer)[call][0] for peer in range(3)])
                # To the last byte.
                row = group.registries[rank].table[tag & 0xFFFFF].tolist()
                for peer in {0, 1, 2} - {rank}:
                    address, nbytes = inputs(peer)[call]
                    assert group.spaces[rank].seen(row[1 + peer] + nbytes - 1) == (peer, address + nbytes - 1)
    for space in group.spaces:
        # Three pieces of two peers, each once; three windows of each.
        assert (space.log.count("import_piece"), space.log.count("map"), space.log.count("open")) == (6, 6, 0)
    assert open_files() == before


def test_more_than_a_message_takes() -> None:
    calls = 20_000
    group = Group(2, rows=calls)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 1 << 30)
    offsets = [random.Random(rank).sample(range(0, 1 << 30, 16), calls) for rank in range(2)]  # noqa: S311 - test data

    def inputs(rank: int) -> list[tuple[int, int]]:
        return [(place(rank) + offset, 16) for offset in offsets[rank]]

    text = _inputs.Inputs(rows=[(0, offset) for offset in offsets[0]]).parts()
    assert len(text) > 1
    for rank, tags in enumerate(group.capture(inputs)):
        assert isinstance(tags, list), tags
        for call in (0, 1, calls // 2, calls - 1):
            group.check(rank, tags[call], [place(peer) + offsets[peer][call] for peer in range(2)])


def test_parts_of_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_inputs, "_PART_CHARS", 100)
    group = Group(2)
    for rank, space in enumerate(group.spaces):
        for number in range(1 + 20 * rank):
            space.allocate(place(rank) + number * 4096, 4096)

    def inputs(rank: int) -> list[tuple[int, int]]:
        return [(place(rank) + number * 4096 * rank, 16) for number in range(21)]

    for rank, tags in enumerate(group.capture(inputs)):
        assert isinstance(tags, list), tags
        for call, tag in enumerate(tags):
            group.check(rank, tag, [inputs(peer)[call][0] for peer in range(2)])


def test_what_one_rank_cant_share_is_refused_alike_and_the_next_capture_copies() -> None:
    group = Group(3)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096)
    group.spaces[1].broken["locate"] = "its allocation can't be shared"
    errors = group.capture(lambda rank: [(place(rank), 16)])
    assert all(isinstance(error, comm.CaptureError) for error in errors), errors
    assert len({str(error) for error in errors}) == 1
    assert "rank 1 (11 in the job): RuntimeError: its allocation can't be shared" in str(errors[0])
    for rank, registry in enumerate(group.registries):
        assert (registry.used, registry.table.count_nonzero().item()) == (0, 0)
        assert "rank 1" in registry.refused
        # Nobody is asked any more: without an open stage, a word to the others would raise.
        group.channels[rank]._stage = None
        with registry.capture():
            assert registry.take(place(rank), 16) == 0


@pytest.mark.parametrize(
    ("sharing", "what"), [(IPC, "open"), (FILE, "import_piece"), (FILE, "share"), (FABRIC, "map"), (IPC, "share")]
)
def test_what_one_rank_cant_open_or_share_is_refused_alike(sharing: int, what: str) -> None:
    group = Group(3)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096, sharing)
    group.spaces[2].broken[what] = "no more of these"
    errors = group.capture(lambda rank: [(place(rank), 16)])
    assert all(isinstance(error, comm.CaptureError) for error in errors), errors
    assert len({str(error) for error in errors}) == 1
    assert "no more of these" in str(errors[0])
    for registry in group.registries:
        assert (registry.used, registry.table.count_nonzero().item()) == (0, 0)
        assert registry.refused


def test_a_rank_without_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(2)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096, FILE)
    tries = iter((True, False))
    real = registration.Mailbox

    def one_of_two() -> registration.Mailbox:
        if next(tries):
            raise OSError("no room in the temporary folder")
        return real()

    monkeypatch.setattr(registration, "Mailbox", one_of_two)
    errors = group.capture(lambda rank: [(place(rank), 16)])
    assert all("no room in the temporary folder" in str(error) for error in errors), errors
    assert all(registry.refused for registry in group.registries)


def test_an_exception_inside_is_the_callers_own_and_its_rows_are_taken_again() -> None:
    group = Group(2)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096)

    def fails(rank: int, registry: registration.Registry) -> list[int]:
        with registry.capture():
            tags = [registry.take(place(rank), 16) for _ in range(3 - rank)]
            if rank == 1:
                raise KeyError("the model")
        return tags

    mine, theirs = group.run(fails)
    assert isinstance(theirs, KeyError)
    assert isinstance(mine, comm.CommError)
    assert "the model" in str(mine)
    assert [space.log.count("open") for space in group.spaces] == [0, 0]
    everyone = group.capture(lambda rank: [(place(rank) + 16, 16)])
    for rank, tags in enumerate(everyone):
        assert isinstance(tags, list), tags
        # The same row with another tag: the graph of before finds that it isn't its own.
        assert (tags[0] & 0xFFFFF, tags[0] >> 20) == (0, 4 - rank)
        group.check(rank, tags[0], [place(peer) + 16 for peer in range(2)])
        assert not group.registries[rank].refused


def test_an_exit_by_exception_talks_to_nobody() -> None:
    group = Group(2)
    group.spaces[0].allocate(place(0), 4096)
    registry = group.registries[0]  # no stage is open

    def fails() -> None:
        with registry.capture():
            registry.take(place(0), 16)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert group.spaces[0].log == []
    with registry.capture():
        pass  # nothing recorded: nothing to be said either


def test_a_full_table_gives_none_alike_and_loses_nothing() -> None:
    group = Group(2, rows=3)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096)
    everyone = group.capture(lambda rank: [(place(rank) + 16 * call, 16) for call in range(5)])
    for rank, tags in enumerate(everyone):
        assert isinstance(tags, list), tags
        assert [bool(tag) for tag in tags] == [True] * 3 + [False] * 2
        group.check(rank, tags[2], [place(peer) + 32 for peer in range(2)])
    assert group.capture(lambda rank: [(place(rank), 16)]) == [[0], [0]]


def test_ranks_that_record_different_calls_are_told_so() -> None:
    group = Group(2)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096)
    errors = group.capture(lambda rank: [(place(rank), 16)] * (1 + rank))
    assert [str(error) for error in errors] == [str(errors[0])] * 2
    assert "{0: 1, 1: 2}" in str(errors[0])
    # Their own doing, which the next capture needn't repeat.
    assert all(isinstance(tags, list) for tags in group.capture(lambda rank: [(place(rank), 16)]))


@pytest.mark.parametrize("moved", [0, 4096])
def test_an_allocation_that_has_anothers_place_is_opened_once_that_is_let_go(moved: int) -> None:
    """In each session of the process: the driver refuses to map what overlaps."""
    group = Group(2)
    others = [registration.Registry(group.context(rank), group.spaces[rank].memory(), 64) for rank in range(2)]

    def in_both(rank: int, registry: registration.Registry) -> list[int]:
        with registry.capture():
            mine = registry.take(place(rank) + moved, 16)
        with others[rank].capture():
            return [mine, others[rank].take(place(rank) + moved, 16)]

    for nbytes in (8192, 16384):
        for rank, space in enumerate(group.spaces):
            space.allocate(place(rank) if nbytes == 8192 else place(rank) + moved, nbytes)
        for rank, tags in enumerate(group.run(in_both)):
            assert isinstance(tags, list), tags
            group.check(rank, tags[0], [place(peer) + moved for peer in range(2)])
    assert [len(space.opened) for space in group.spaces] == [2, 2]


def test_calls_of_different_sizes_are_never_taken_for_each_other() -> None:
    group = Group(3)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096)
    errors = group.capture(lambda rank: [(place(rank), 16), (place(rank), 48 if rank == 1 else 32)])
    assert all("different sizes of calls" in str(error) for error in errors)
    assert group.registries[0].used == 0
    assert all(isinstance(tags, list) for tags in group.capture(lambda rank: [(place(rank), 48)]))


def test_tables_that_dont_agree_any_more_are_given_up_alike() -> None:
    group = Group(2)
    for rank, space in enumerate(group.spaces):
        space.allocate(place(rank), 4096)
    group.registries[0]._used = 1
    errors = group.capture(lambda rank: [(place(rank), 16)])
    assert all(isinstance(error, comm.CaptureError) for error in errors)
    assert "different numbers of rows: {0: 1, 1: 0}" in str(errors[0])
    assert all(registry.refused for registry in group.registries)


def test_close_lets_go_once() -> None:
    group = Group(2)
    registry, space = group.registries[0], group.spaces[0]
    registry.close()
    registry.close()
    assert space.closed == 1
    with pytest.raises(ValueError, match="closed"):
        registry.table.numel()


def test_whether_torchs_memory_can_be_shared_is_known_before() -> None:
    group = Group(2)
    registry, space = group.registries[0], group.spaces[0]
    assert "no allocation at" in registry.problem()
    space.allocate(registry.table.data_ptr(), registry.table.nbytes)
    assert registry.problem() == ""


def topology(allocators: list[str | None], hosts: list[str]) -> comm.Topology:
    return comm.Topology.of(
        [
            comm.RankInfo(rank, comm.Host(host, host), allocator=allocator)
            for rank, (allocator, host) in enumerate(zip(allocators, hosts, strict=True))
        ],
        ("cuda",),
    )


@pytest.mark.parametrize(
    ("allocators", "hosts", "reason"),
    [
        (["native"] * 2, ["a", "a"], ""),
        (["expandable_segments"] * 2, ["a", "a"], ""),
        (["native"] * 2, ["a", "b"], "several hosts"),
        (["native", "expandable_segments"], ["a", "a"], "allocators differ: {0: 'native', 1: 'expandable_segments'}"),
        (["cudaMallocAsync"] * 2, ["a", "a"], "'cudaMallocAsync' can't be shared"),
        ([None] * 2, ["a", "a"], "can't be shared"),
    ],
)
def test_what_is_known_from_the_topology(allocators: list[str | None], hosts: list[str], reason: str) -> None:
    answer = registration.unshareable(topology(allocators, hosts))
    assert (reason in answer) if reason else answer == ""
