"""Shares of a padded batch's real tokens."""

from __future__ import annotations

import itertools

import comm_core as comm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

share = comm.local_num_tokens_non_padded


def test_every_small_batch_is_shared_from_the_front() -> None:
    checked = 0
    for world_size, chunk in itertools.product(range(1, 9), range(7)):
        bucket = world_size * chunk
        for num_tokens in range(bucket + 1):
            shares = [share(num_tokens, bucket, rank, world_size) for rank in range(world_size)]
            # Row by row: the real ones come first.
            rows = [int(row < num_tokens) for row in range(bucket)]
            assert shares == [sum(rows[rank * chunk : (rank + 1) * chunk]) for rank in range(world_size)]
            checked += 1
    assert checked > 700


def test_tensors_have_the_same_arithmetic() -> None:
    for world_size, chunk in itertools.product(range(1, 6), range(5)):
        bucket = world_size * chunk
        for rank, dtype in itertools.product(range(world_size), (torch.int32, torch.int64, torch.int8, torch.uint8)):
            numbers = list(range(bucket + 1))
            found = share(torch.tensor(numbers, dtype=dtype), bucket, rank, world_size)
            assert found.dtype is dtype
            assert found.tolist() == [share(number, bucket, rank, world_size) for number in numbers]


@given(st.integers(1, 1024), st.integers(0, 1 << 16), st.data())
def test_shares_add_up_and_fill_from_the_front(world_size: int, chunk: int, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(0, world_size * chunk))
    shares = [share(num_tokens, world_size * chunk, rank, world_size) for rank in range(world_size)]
    assert sum(shares) == num_tokens
    assert shares == sorted(shares, reverse=True)
    assert len({each for each in shares if 0 < each < chunk}) <= 1
    twin = share(torch.tensor(num_tokens), world_size * chunk, world_size - 1, world_size)
    assert twin.item() == shares[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1, 10, 0, 4), "a bucket of 10 rows doesn't divide among 4 ranks"),
        ((1, -4, 0, 4), "a bucket of -4 rows"),
        ((9, 8, 0, 4), "9 tokens don't fit into a bucket of 8"),
        ((-1, 8, 0, 4), "-1 tokens don't fit"),
        ((1, 8, 4, 4), "rank 4 isn't one of 4"),
        ((1, 8, -1, 4), "rank -1 isn't one of 4"),
        ((1, 8, 0, 0), "rank 0 isn't one of 0"),
    ],
)
def test_what_cant_be_shared_is_refused(arguments: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        share(*arguments)
    if "tokens" not in said:
        with pytest.raises(ValueError, match=said):
            share(torch.tensor(arguments[0]), *arguments[1:])


def test_counts_stay_where_they_are() -> None:
    counts = comm.TokenCounts(12, 1, 3, "cpu")
    assert (counts.total.tolist(), counts.local.tolist()) == ([0], [0])
    places = counts.total.data_ptr(), counts.local.data_ptr()
    for num_tokens in (0, 3, 4, 5, 8, 9, 12):
        counts.fill(num_tokens)
        expected = [num_tokens], [share(num_tokens, 12, 1, 3)]
        assert (counts.total.tolist(), counts.local.tolist()) == expected
        counts.fill(0)
        for tensor in (torch.tensor(num_tokens), torch.tensor([num_tokens], dtype=torch.int32)):
            counts.fill(tensor)
            assert (counts.total.tolist(), counts.local.tolist()) == expected
    assert (counts.total.data_ptr(), counts.local.data_ptr()) == places
    assert counts.total.dtype is counts.local.dtype is torch.int32


def test_a_refused_count_leaves_the_last_one() -> None:
    counts = comm.TokenCounts(8, 0, 2, "cpu")
    counts.fill(3)
    with pytest.raises(ValueError, match="don't fit"):
        counts.fill(9)
    assert (counts.total.item(), counts.local.item()) == (3, 3)
    with pytest.raises(ValueError, match="doesn't divide"):
        comm.TokenCounts(9, 0, 2, "cpu")


def test_a_small_dtype_holds_the_shares_of_a_large_bucket() -> None:
    for dtype in (torch.int8, torch.uint8, torch.uint16):
        assert share(torch.tensor([100], dtype=dtype), 4096, 0, 4).tolist() == [100]
        assert share(torch.tensor([100], dtype=dtype), 4096, 3, 4).tolist() == [0]


class Index:
    """An integer of another library."""

    def __index__(self) -> int:
        return 3


def test_other_integers_are_counts_and_everything_else_is_refused() -> None:
    counts = comm.TokenCounts(8, 0, 2, "cpu")
    counts.fill(Index())  # type: ignore[arg-type]
    assert (counts.total.item(), counts.local.item()) == (3, 3)
    assert share(Index(), 8, 1, 2) == 0  # type: ignore[type-var]
    wrong: list[object] = [2.5, None, "3", torch.tensor(2.5), torch.tensor(3j)]
    for number in wrong:
        with pytest.raises(TypeError, match=r"integer"):
            counts.fill(number)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"integer"):
            share(number, 8, 0, 2)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"one number of tokens; got a tensor \[2\]"):
        counts.fill(torch.tensor([1, 2]))
    assert (counts.total.item(), counts.local.item()) == (3, 3)


def test_a_number_isnt_filled_in_while_a_stream_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = comm.TokenCounts(8, 0, 2, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(comm.CaptureError, match="Call fill before the capture"):
        counts.fill(3)
    assert counts.total.item() == 0
    # Of a tensor the graph keeps the address, not the value.
    counts.fill(torch.tensor(5))
    assert counts.local.item() == 4
