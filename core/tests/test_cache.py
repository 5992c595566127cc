"""Nothing is loaded from where another user could have put it, and one process builds for all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from comm_core._native import cache
from comm_core._native.cache import build_once, mtime_ns, private_folder, root
from comm_core.errors import CommTimeoutError, PluginLoadError

# Far longer than anything here takes; whoever runs into it fails.
DEADLINE_S = 60.0


def writes(text: str) -> Callable[[Path], Path]:
    def build(scratch: Path) -> Path:
        (scratch / "by-product").touch()
        (scratch / "made").write_text(text)
        return scratch / "made"

    return build


def never(scratch: Path) -> Path:
    raise AssertionError("nothing was to be built")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Whatever is made without care, all the world can write."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """A lock is a file's: threads stand for processes."""
    with ThreadPoolExecutor() as threads:
        yield threads


def test_the_cache_is_where_the_user_says_else_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert root(None) == Path("/home/me/.cache/comm_core")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert root(None) == Path("/home/me/.cache/comm_core")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert root(None) == Path("/caches/comm_core")
    assert root("/scratch") == Path("/scratch")


@pytest.mark.usefixtures("open_umask")
def test_what_is_made_is_private(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "new" / "cache", "key")
    built = build_once(folder, "a.so", writes("code"), DEADLINE_S)
    assert built.read_text() == "code"
    assert [mode(path) for path in (folder.parents[1], folder.parent, folder, built)] == [0o700] * 4
    assert mode(folder / "lock") == 0o600
    assert {path.name for path in folder.iterdir()} == {"a.so", "a.so.sha256", "lock"}
    assert build_once(folder, "a.so", never, DEADLINE_S) == built


def test_a_folder_that_others_only_read_and_a_link_above_it_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real" / "cache").mkdir(parents=True, mode=0o755)
    (tmp_path / "link").symlink_to("real")
    assert private_folder(tmp_path / "link" / "cache", "key") == tmp_path / "real" / "cache" / "key"


@pytest.mark.parametrize("where", ["parent", "cache", "cache/key"])
@pytest.mark.parametrize("bits", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_is_refused(where: str, bits: int, tmp_path: Path) -> None:
    top = tmp_path / "parent" / "cache"
    private_folder(top, "key")
    open_one = tmp_path / "parent" if where == "parent" else tmp_path / "parent" / where
    open_one.chmod(bits)
    if where == "parent" and bits & 0o1000:
        # As /tmp is: in a sticky folder no user can replace another's files.
        assert private_folder(top, "key").is_dir()
        return
    with pytest.raises(PluginLoadError, match=rf"others can write {open_one} \(mode {bits:04o}\). Do chmod go-w"):
        private_folder(top, "key")


@pytest.mark.parametrize("where", ["cache", "cache/key"])
def test_a_link_is_refused_though_it_leads_to_a_private_folder(where: str, tmp_path: Path) -> None:
    private_folder(tmp_path / "cache", "key")
    (tmp_path / where).rename(tmp_path / "elsewhere")
    (tmp_path / where).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PluginLoadError, match=f"{tmp_path / where}: it isn't a folder, but a link"):
        private_folder(tmp_path / "cache", "key")


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").touch(mode=0o600)
    with pytest.raises(PluginLoadError, match="it isn't a folder, but a link or a file"):
        private_folder(tmp_path / "cache", "key")


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_folder(tmp_path / "cache", "key")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(PluginLoadError, match=f"belongs to user id {owner}, not to {owner + 1}"):
        private_folder(tmp_path / "cache", "key")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("where", [".", "cache", "cache/key", "cache/key/a.so"])
def test_another_users_file_or_folder_is_refused_by_root_too(where: str, tmp_path: Path) -> None:
    build_once(private_folder(tmp_path / "cache", "key"), "a.so", writes("code"), DEADLINE_S)
    os.chown(tmp_path / where, 12345, -1)
    with pytest.raises(PluginLoadError, match="belongs to user id 12345, not to 0"):
        build_once(private_folder(tmp_path / "cache", "key"), "a.so", never, DEADLINE_S)


def test_a_binary_that_others_can_write_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = private_folder(tmp_path, "key")
    built = build_once(folder, "a.so", writes("code"), DEADLINE_S)
    built.chmod(0o702)
    with pytest.raises(PluginLoadError, match=f"others can write {built}"):
        build_once(folder, "a.so", never, DEADLINE_S)
    built.chmod(0o700)
    built.rename(tmp_path / "elsewhere")
    built.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PluginLoadError, match=f"{built} isn't loaded: it isn't a regular file"):
        build_once(folder, "a.so", never, DEADLINE_S)


@pytest.mark.parametrize("part", [0, 1, 500, 999])
def test_a_file_that_was_cut_short_is_built_again(part: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, code = private_folder(tmp_path, "key"), "x" * 1000
    built = build_once(folder, "a.so", writes(code), DEADLINE_S)
    with built.open("r+") as file:
        file.truncate(part)
    assert build_once(folder, "a.so", writes(code), DEADLINE_S).read_text() == code
    assert [record.getMessage() for record in caplog.records] == [
        f"{built} is damaged or can't be loaded: building it again"
    ]
    assert build_once(folder, "a.so", never, DEADLINE_S) == built


@pytest.mark.parametrize("digest", [None, "", "0" * 64])
def test_a_file_without_its_digest_is_built_again(digest: str | None, tmp_path: Path) -> None:
    folder = private_folder(tmp_path, "key")
    built = build_once(folder, "a.so", writes("old"), DEADLINE_S)
    recorded = folder / "a.so.sha256"
    recorded.unlink() if digest is None else recorded.write_text(digest)
    assert build_once(folder, "a.so", writes("new"), DEADLINE_S).read_text() == "new"
    assert build_once(folder, "a.so", never, DEADLINE_S) == built


def test_a_rejected_file_is_built_again_once(tmp_path: Path) -> None:
    folder = private_folder(tmp_path, "key")
    first = mtime_ns(build_once(folder, "a.so", writes("code"), DEADLINE_S))
    built = build_once(folder, "a.so", writes("code"), DEADLINE_S, rejected_ns=first)
    assert mtime_ns(built) != first
    # As another process that rejected the first file, too.
    assert build_once(folder, "a.so", never, DEADLINE_S, rejected_ns=first) == built


def test_what_a_dead_builder_left_is_removed_and_never_taken(tmp_path: Path) -> None:
    folder = private_folder(tmp_path, "key")
    (folder / "build-dead").mkdir()
    (folder / "build-dead" / "a.so").write_text("half")
    (folder / "lock").write_text("12345")
    assert build_once(folder, "a.so", writes("whole"), DEADLINE_S).read_text() == "whole"
    assert {path.name for path in folder.iterdir()} == {"a.so", "a.so.sha256", "lock"}


class SlowBuild:
    """A build that lasts until the test ends it, and knows when another process waits for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.began, self.awaited, self.may_end = threading.Event(), threading.Event(), threading.Event()
        self.fails = False
        # Whoever finds the lock taken sleeps before it looks again.
        monkeypatch.setattr(cache.time, "sleep", lambda _: self.awaited.set())

    def build(self, scratch: Path) -> Path:
        self.began.set()
        assert self.may_end.wait(DEADLINE_S)
        if self.fails:
            raise PluginLoadError("the compiler's words")
        return writes("code")(scratch)

    def run(self, pool: ThreadPoolExecutor, second: Callable[[Path], Path], *, fails: bool) -> list[Future[Path]]:
        """Two at once, of which the first builds."""
        self.fails = fails
        first = pool.submit(build_once, self.folder, "a.so", self.build, DEADLINE_S)
        assert self.began.wait(DEADLINE_S)
        other = pool.submit(build_once, self.folder, "a.so", second, DEADLINE_S)
        assert self.awaited.wait(DEADLINE_S)
        self.may_end.set()
        return [first, other]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowBuild:
    return SlowBuild(private_folder(tmp_path, "key"), monkeypatch)


def test_who_waits_for_a_build_takes_its_result(slow: SlowBuild, pool: ThreadPoolExecutor) -> None:
    for future in slow.run(pool, never, fails=False):
        assert future.result(DEADLINE_S).read_text() == "code"


def test_waiters_of_a_failed_build_fail_alike_and_the_next_call_builds_again(
    slow: SlowBuild, pool: ThreadPoolExecutor
) -> None:
    for future in slow.run(pool, never, fails=True):
        with pytest.raises(PluginLoadError, match="the compiler's words"):
            future.result(DEADLINE_S)
    assert build_once(slow.folder, "a.so", writes("code"), DEADLINE_S).read_text() == "code"


def test_waiting_ends_and_names_the_process(slow: SlowBuild, pool: ThreadPoolExecutor) -> None:
    first = pool.submit(build_once, slow.folder, "a.so", slow.build, DEADLINE_S)
    assert slow.began.wait(DEADLINE_S)
    with pytest.raises(CommTimeoutError, match=rf"process {os.getpid()} hasn't finished building in {slow.folder}"):
        build_once(slow.folder, "a.so", never, 0.1)
    slow.may_end.set()
    assert first.result(DEADLINE_S).is_file()


def test_an_error_that_isnt_the_compilers_leaves_no_half(tmp_path: Path) -> None:
    folder = private_folder(tmp_path, "key")

    def full(scratch: Path) -> Path:
        (scratch / "half").touch()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        build_once(folder, "a.so", full, DEADLINE_S)
    assert {path.name for path in folder.iterdir()} == {"lock"}
