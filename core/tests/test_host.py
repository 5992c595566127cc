from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from comm_core._probe.host import probe_host

BOOT = "2a5f5b0e-6d52-4ff0-b7b7-5c1f3a1b2c3d"


@pytest.fixture
def host_tree(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Builds a host's procfs and /dev/shm of files: those of one key are the same in every host that shares it."""

    def build(kernel: str, ipc: str, shm: str, boot_id: str = BOOT) -> dict[str, Path]:
        proc = tmp_path / f"proc-{kernel}-{ipc}"
        (proc / "sys/kernel/random").mkdir(parents=True, exist_ok=True)
        (proc / "sys/kernel/random/boot_id").write_text(boot_id + "\n")
        (proc / "self/ns").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ipc-{ipc}").touch()
        if not (proc / "self/ns/ipc").is_symlink():
            (proc / "self/ns/ipc").symlink_to(tmp_path / f"ipc-{ipc}")
        (tmp_path / f"shm-{shm}").mkdir(exist_ok=True)
        return {"proc": proc, "shm": tmp_path / f"shm-{shm}"}

    return build


def test_this_host_is_the_same_host_twice() -> None:
    unknown: dict[str, str] = {}
    one, other = probe_host(unknown), probe_host(unknown)
    assert unknown == {}
    assert one.id == other.id
    assert one.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert one.shm_nbytes is not None
    assert one.shm_nbytes >= 0


def test_another_process_is_on_this_host() -> None:
    code = "from comm_core._probe.host import probe_host; print(probe_host({}).id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == probe_host({}).id


def test_containers_of_one_machine_are_two_hosts_on_one_kernel(host_tree: Callable[..., dict[str, Path]]) -> None:
    one = probe_host({}, **host_tree("k", "ipc1", "shm1"), name="pod")
    other_ipc = probe_host({}, **host_tree("k", "ipc2", "shm1"), name="pod")
    other_shm = probe_host({}, **host_tree("k", "ipc1", "shm2"), name="pod")
    assert len({one.id, other_ipc.id, other_shm.id}) == 3
    assert one.boot_id == other_ipc.boot_id == other_shm.boot_id == BOOT


def test_containers_that_share_everything_are_one_host(
    host_tree: Callable[..., dict[str, Path]],
) -> None:
    tree = host_tree("k", "ipc", "shm")
    assert probe_host({}, **tree, name="pod-a").id == probe_host({}, **tree, name="pod-b").id


def test_clones_with_one_name_are_two_hosts(host_tree: Callable[..., dict[str, Path]]) -> None:
    one = probe_host({}, **host_tree("k1", "ipc", "shm"), name="clone")
    other = probe_host({}, **host_tree("k2", "ipc", "shm", boot_id=BOOT.replace("2a", "3b")), name="clone")
    assert one.id != other.id


@pytest.mark.parametrize("boot_id", ["", "unavailable", "0"])
def test_without_a_boot_id_no_two_processes_share_a_host(
    host_tree: Callable[..., dict[str, Path]], boot_id: str
) -> None:
    unknown: dict[str, str] = {}
    tree = host_tree("k", "ipc", "shm", boot_id=boot_id)
    one, other = probe_host(unknown, **tree, name="node"), probe_host({}, **tree, name="node")
    assert one.boot_id is None
    assert one.id != other.id
    assert "node" in one.id
    assert "host.boot_id" in unknown


def test_the_name_stands_in_for_what_cannot_be_read(host_tree: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    tree = host_tree("k", "ipc", "shm")
    (tree["proc"] / "self/ns/ipc").unlink()
    tree["shm"] = tmp_path / "nothing"
    unknown: dict[str, str] = {}
    one, same = (probe_host(unknown, **tree, name="pod-a") for _ in range(2))
    other = probe_host({}, **tree, name="pod-b")
    assert one.id == same.id != other.id
    assert one.shm_nbytes is None
    assert {"host.id", "host.shm_nbytes"} <= set(unknown)
