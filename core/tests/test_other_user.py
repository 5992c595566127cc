"""What another user of this machine can do to a job: nothing but be refused (SECURITY.md)."""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comm_core as comm
import pytest
import torch
from comm_core import memory
from comm_core._memory.file_exchange import exchange_files
from comm_core._native.cache import build_once, private_folder
from comm_core.errors import PluginLoadError
from other_user import UID, as_other_user, needs_root
from test_cache import DEADLINE_S, never, writes

pytestmark = needs_root


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder like /tmp: all users write to it, and each replaces only its own files."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def test_the_other_user_is_another(public: Path) -> None:
    assert as_other_user(os.getuid) == f"returned {UID}"
    assert as_other_user(lambda: (public / "mine").write_text("x")) == "returned 1"
    assert (public / "mine").stat().st_uid == UID


def test_the_cache_isnt_read_written_swapped_or_removed(public: Path) -> None:
    folder = private_folder(public / "cache", "key")
    built = build_once(folder, "a.so", writes("code"), DEADLINE_S)
    attacks: dict[str, Callable[[], object]] = {
        "list": lambda: list(folder.iterdir()),
        "read": built.read_bytes,
        "write": lambda: built.write_bytes(b"mine"),
        "squat": lambda: (folder / "b.so").write_bytes(b"mine"),
        "lock": lambda: os.open(folder / "lock", os.O_RDWR),
        "swap": lambda: (public / "cache").rename(public / "elsewhere"),
        "remove": lambda: shutil.rmtree(public / "cache"),
        "chmod": lambda: (public / "cache").chmod(0o777),
    }
    assert {name: as_other_user(attack) for name, attack in attacks.items()} == dict.fromkeys(
        attacks, "PermissionError"
    )
    assert build_once(folder, "a.so", never, DEADLINE_S).read_text() == "code"


def test_a_folder_that_another_user_made_first_is_refused(public: Path) -> None:
    def squat() -> None:
        (public / "cache").mkdir(mode=0o777)
        (public / "cache" / "key").mkdir()
        (public / "cache" / "key" / "a.so").write_text("mine")

    assert as_other_user(squat) == "returned None"
    with pytest.raises(PluginLoadError, match=f"belongs to user id {UID}, not to 0"):
        private_folder(public / "cache", "key")


def test_a_link_that_another_user_made_first_is_refused(public: Path) -> None:
    mine = private_folder(public / "mine", "key")
    assert as_other_user(lambda: (public / "cache").symlink_to(mine.parent)) == "returned None"
    with pytest.raises(PluginLoadError, match="it isn't a folder, but a link"):
        private_folder(public / "cache", "key")


def test_a_cache_below_a_folder_that_another_user_can_write_is_refused(public: Path) -> None:
    public.chmod(0o777)  # not sticky: any user can replace what is in it
    with pytest.raises(PluginLoadError, match="others can write"):
        private_folder(public / "cache", "key")
    assert as_other_user(lambda: (public / "cache").rename(public / "elsewhere")) == "returned " + str(
        public / "elsewhere"
    )


def pair(run: Callable[[int, Any], object], attack: Callable[[list[Any]], object]) -> list[Any]:
    """Run two ranks as threads; `attack` gets what they have exchanged first, before either goes on."""
    barrier = threading.Barrier(2)
    gathered: dict[int, dict[int, Any]] = {}

    def control(rank: int) -> SimpleNamespace:
        steps = iter(range(100))

        def all_gather(value: Any) -> list[Any]:
            step = next(steps)
            gathered.setdefault(step, {})[rank] = value
            barrier.wait(60)
            if step == 0:
                if rank == 0:
                    attack([gathered[0][peer] for peer in range(2)])
                barrier.wait(60)
            return [gathered[step][peer] for peer in range(2)]

        return SimpleNamespace(all_gather=all_gather, barrier=lambda: all_gather(None))

    results: list[Any] = [None, None]

    def work(rank: int) -> None:
        group: Any = object()
        context = comm.GroupContext(group, rank, 2, torch.device("cpu"), (0, 1), control(rank), 1 << 30, 3.0)
        try:
            results[rank] = run(rank, context)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def send_to(boxes: list[Any], texts: list[str], file: int) -> int:
    """Send texts, each with an open file, to sockets, as far as they take it; return how many they took."""
    count = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as box:
        box.setblocking(False)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        for address, _ in boxes:
            for text in texts:
                with contextlib.suppress(BlockingIOError):  # it is full
                    box.sendmsg([text.encode()], rights, 0, bytes.fromhex(address))
                    count += 1
    return count


def exchange(rank: int, context: comm.GroupContext) -> list[bytes]:
    with tempfile.TemporaryFile() as file:
        file.write(f"of rank {rank}".encode())
        file.flush()
        with exchange_files(file.fileno(), context) as received:
            return [os.pread(descriptor, 100, 0) for descriptor in received.values()]


def copies(descriptor: int) -> int:
    """Return how many of this process's descriptors are of the same file."""
    links = Path("/proc/self/fd")
    return sum(link.resolve() == (links / str(descriptor)).resolve() for link in links.iterdir())


def test_files_that_another_user_sends_are_dropped() -> None:
    """The sockets' addresses are in /proc/net/unix, for every user to send to; the secret isn't."""
    sent: list[str] = []
    texts = ["0" * 32 + "0", "0" * 32 + "1", "", "x" * 40]
    with tempfile.TemporaryFile() as file:
        before = copies(file.fileno())
        found = pair(exchange, lambda boxes: sent.append(as_other_user(lambda: send_to(boxes, texts, file.fileno()))))
        assert copies(file.fileno()) == before
    assert found == [[b"of rank 1"], [b"of rank 0"]]
    assert sent == ["returned 8"]


def test_a_socket_that_another_user_fills_costs_no_more_than_an_error() -> None:
    with tempfile.TemporaryFile() as file:
        found = pair(exchange, lambda boxes: as_other_user(lambda: send_to(boxes, ["x"] * 1000, file.fileno())))
    assert all(isinstance(error, RuntimeError) for error in found), found
    assert any("an open file can't be sent to rank" in str(error) for error in found), found


def test_shared_memory_isnt_opened_by_another_user() -> None:
    def run(rank: int, context: comm.GroupContext) -> dict[str, str]:
        buffer = memory.share(4096, context, lambda tensor: tensor.fill_(rank + 1))
        try:
            return {} if rank else attacks_on(os.getpid(), buffer.addresses[0])
        finally:
            context.control.barrier()
            buffer.close()

    found, _ = pair(run, lambda _: None)
    assert isinstance(found, dict), found
    assert len(found) > 3
    assert set(found.values()) == {"PermissionError"}, found


def attacks_on(pid: int, address: int) -> dict[str, str]:
    """Try to reach a mapping of this process as another user."""
    process = Path(f"/proc/{pid}")
    mapped = next(line for line in (process / "maps").read_text().splitlines() if line.startswith(f"{address:x}-"))
    assert "memfd:comm_core" in mapped
    attacks: dict[str, Callable[[], object]] = {
        "its descriptors": lambda: list((process / "fd").iterdir()),
        "its memory": lambda: os.open(process / "mem", os.O_RDWR),
        "its mappings": (process / "maps").read_text,
        "the mapped file": lambda: os.open(process / "map_files" / mapped.split()[0], os.O_RDWR),
    }
    return {name: as_other_user(attack) for name, attack in attacks.items()}


def test_nothing_with_a_name_is_left_to_others_in_dev_shm() -> None:
    """What core shares has no name; files of torch's own may have one, which others can't open."""
    folder = Path("/dev/shm")  # noqa: S108 - only looked at
    before = set(folder.iterdir())

    def run(rank: int, context: comm.GroupContext) -> list[str]:
        buffer = memory.share(4096, context, lambda tensor: tensor.zero_())
        new = [path for path in folder.iterdir() if path not in before and path.name.startswith("comm")]
        context.control.barrier()
        buffer.close()
        return [path.name for path in new if stat.S_IMODE(path.stat().st_mode) & 0o077]

    assert pair(run, lambda _: None) == [[], []]
