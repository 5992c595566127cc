"""Which host this process runs on, as far as shared memory and CUDA IPC are concerned."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from comm_core._probe.attempt import attempt
from comm_core.topology import Host

__all__ = ["PROC", "SHM", "probe_host"]

#: Where procfs is mounted.
PROC = Path("/proc")
#: Where POSIX shared memory lives.
SHM = Path("/dev/shm")  # noqa: S108 - the system's mount, asked about and not written to


def probe_host(unknown: dict[str, str], *, proc: Path = PROC, shm: Path = SHM, name: str | None = None) -> Host:
    """Identify the host by its running kernel, IPC namespace and /dev/shm; never raises.

    Containers of one machine share the first and differ in the others. The host name decides nothing by itself, since
    clones share it, and containers that share all memory may differ in it. It stands in for a namespace or a mount that
    can't be read; for an unreadable kernel, a value does that no other process has. Rather is one host taken for two
    than two for one.

    Args:
        unknown: gains the reason of each part that can't be read, under "host.boot_id", "host.id", "host.shm_nbytes".
        proc: where procfs is mounted.
        shm: where POSIX shared memory lives.
        name: the host name; None asks the system.
    """
    if name is None:
        name = attempt(unknown, "host.name", socket.gethostname) or "unknown"
    boot_id = attempt(unknown, "host.boot_id", lambda: _boot_id(proc))
    namespace = attempt(unknown, "host.id", lambda: _inode(proc / "self/ns/ipc"))
    mount = attempt(unknown, "host.id", lambda: _inode(shm))
    return Host(
        name=name,
        id=f"{boot_id or f'{name}-{uuid.uuid4()}'} ipc {namespace or name} shm {mount or name}",
        boot_id=boot_id,
        shm_nbytes=attempt(unknown, "host.shm_nbytes", lambda: _free_nbytes(shm)),
    )


def _boot_id(proc: Path) -> str:
    # Parsed, so that an empty file or a placeholder, equal on every machine, isn't taken for an identity.
    return str(uuid.UUID((proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()))


def _inode(path: Path) -> str:
    # The device tells two mounts apart, the inode two folders of one mount.
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}"


def _free_nbytes(shm: Path) -> int:
    usage = os.statvfs(shm)
    return usage.f_bavail * usage.f_frsize
