"""The identity of this process's host, for shared memory and CUDA IPC."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from comm_core._probe.attempt import try_query
from comm_core.topology import Host

__all__ = ["PROC", "SHM", "probe_host"]

#: The mount point of procfs.
PROC = Path("/proc")
#: The folder of POSIX shared memory.
SHM = Path("/dev/shm")  # noqa: S108 - the system's mount, read only


def probe_host(unknown: dict[str, str], *, proc: Path = PROC, shm: Path = SHM, name: str | None = None) -> Host:
    """Identify the host by its running kernel, IPC namespace and /dev/shm; never raises.

    Containers of one machine share the kernel and differ in the namespace or the mount. The host name isn't used by
    itself, since clones share it, and containers that share all memory may differ in it. It replaces a namespace or a
    mount that can't be read; a unique value replaces an unreadable kernel's. So one host may count as two, but two
    never count as one.

    Args:
        unknown: gains the reason of each part that can't be read, under "host." and the field's name.
        proc: the mount point of procfs.
        shm: the folder of POSIX shared memory.
        name: the host name; None: the system's.
    """
    if name is None:
        name = try_query(unknown, "host.name", socket.gethostname) or "unknown"
    boot_id = try_query(unknown, "host.boot_id", lambda: _boot_id(proc))
    namespace = try_query(unknown, "host.id", lambda: _inode(proc / "self/ns/ipc"))
    mount = try_query(unknown, "host.id", lambda: _inode(shm))
    return Host(
        name=name,
        id=f"{boot_id or f'{name}-{uuid.uuid4()}'} ipc {namespace or name} shm {mount or name}",
        boot_id=boot_id,
        shm_nbytes=try_query(unknown, "host.shm_nbytes", lambda: _free_nbytes(shm)),
        network=try_query(unknown, "host.network", lambda: _inode(proc / "self/ns/net")),
    )


def _boot_id(proc: Path) -> str:
    # Parsed, so that an empty file or a placeholder, equal on every machine, isn't taken for an identity.
    return str(uuid.UUID((proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()))


def _inode(path: Path) -> str:
    # The device distinguishes two mounts, the inode two folders of one mount.
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}"


def _free_nbytes(shm: Path) -> int:
    usage = os.statvfs(shm)
    return usage.f_bavail * usage.f_frsize
