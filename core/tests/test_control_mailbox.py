"""Open files from rank to rank over Unix sockets; threads as ranks."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comm_core._control.mailbox import Mailbox
from control_ranks import outcome, start

PATIENCE_S = 60.0


def open_files() -> int:
    """The number of open files that `opens` made; other threads open and close theirs meanwhile."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, such as the listing's own
            links.append(str(path.readlink()))
    return sum(link.startswith("/memfd:piece") for link in links)


def opens(text: str) -> Callable[[], int]:
    def export() -> int:
        file = os.memfd_create("piece")
        os.write(file, text.encode())
        return file

    return export


@contextlib.contextmanager
def boxes(count: int) -> Iterator[list[Mailbox]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Mailbox())) for _ in range(count)]


def test_every_file_comes_to_every_peer_and_none_stays_open() -> None:
    # More than a socket's queue takes, and not alike on the ranks.
    keys = {rank: [f"piece {number}" for number in range(count)] for rank, count in enumerate((700, 1, 0))}
    with boxes(3) as mine:
        received: list[dict[tuple[int, str], bytes]] = [{} for _ in mine]

        def exchange(rank: int) -> None:
            def take(source: int, key: str, file: int) -> None:
                received[rank][source, key] = os.pread(file, 100, 0)
                os.close(file)

            outgoing = {key: opens(f"{key} of {rank}") for key in keys[rank]}
            others = [box.path for other, box in enumerate(mine) if other != rank]
            expected = [(other, key) for other in keys if other != rank for key in keys[other]]
            mine[rank].exchange_files(rank, others, outgoing, expected, take, PATIENCE_S)

        for future in [start(lambda rank=rank: exchange(rank)) for rank in range(3)]:
            assert outcome(future) is None
    for rank in range(3):
        assert received[rank] == {
            (other, key): f"{key} of {other}".encode() for other in keys if other != rank for key in keys[other]
        }
    assert open_files() == 0


def test_no_other_user_can_send_and_nothing_is_left() -> None:
    box = Mailbox()
    folder = Path(box.path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    box.close()
    assert not folder.exists()


def test_a_file_that_cant_be_opened_fails_on_every_waiting_rank() -> None:
    def export() -> int:
        raise RuntimeError("no handle of this kind")

    with boxes(2) as mine:

        def exchange(rank: int) -> None:
            outgoing = {"a": export} if rank == 0 else {"b": opens("b")}
            expected = [(1, "b")] if rank == 0 else [(0, "a")]
            mine[rank].exchange_files(
                rank, [mine[1 - rank].path], outgoing, expected, lambda _source, _key, file: os.close(file), PATIENCE_S
            )

        errors = [outcome(future) for future in [start(lambda rank=rank: exchange(rank)) for rank in range(2)]]
    assert [str(error) for error in errors] == ["no handle of this kind"] * 2


def test_what_doesnt_come_ends_the_wait() -> None:
    with boxes(2) as mine, pytest.raises(TimeoutError, match=r"\(1, 'b'\)"):
        mine[0].exchange_files(0, [mine[1].path], {}, [(1, "b")], lambda _source, _key, _file: None, 0.2)


def test_a_peer_that_is_gone_is_an_error() -> None:
    with boxes(2) as mine:
        mine[1].close()
        with pytest.raises(OSError):  # noqa: PT011 - what the system calls it is its own affair
            mine[0].exchange_files(
                0, [mine[1].path], {"a": opens("a")}, [], lambda _source, _key, _file: None, PATIENCE_S
            )


def test_unexpected_files_are_refused() -> None:
    with boxes(2) as mine:
        mine[1].exchange_files(1, [mine[0].path], {"a": opens("a")}, [], lambda _source, _key, _file: None, PATIENCE_S)
        with pytest.raises(RuntimeError, match="rank 1 sent an unexpected message"):
            mine[0].exchange_files(0, [], {}, [(1, "b")], lambda _source, _key, _file: None, PATIENCE_S)
