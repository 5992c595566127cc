"""Two hosts for real: processes in UTS, IPC, mount and network namespaces of their own, joined by a veth pair."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from comm_core.topology import Host, RankInfo, Topology

# A backend that serves groups inside one host alone.
PLUGIN = """
import torch.distributed as dist
import comm_core as comm

COMM_HOOK_API = (1, 0)

@comm.hookimpl
def is_available(topology):
    hosts = {info.host.id for info in topology.ranks}
    return comm.Available(900) if topology.one_host else comm.Unavailable(f"its ranks are on {len(hosts)} hosts")

@comm.hookimpl
def all_reduce(session, tensor, out):
    out = tensor.clone() if out is None else out.copy_(tensor)
    dist.all_reduce(out, group=session.group)
    return out
"""

# Four ranks, two a host; groups over all, over each host, and across the hosts.
WORKER = """
import json, sys
import torch
import torch.distributed as dist
import comm_core as comm

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29500", rank=rank, world_size=4)
report = {}
for name, ranks in {"world": [0, 1, 2, 3], "one": [0, 1], "other": [2, 3], "across": [1, 3]}.items():
    group = dist.group.WORLD if name == "world" else dist.new_group(ranks)
    if rank in ranks:
        backend = comm.get_backend(group)
        report[name] = {
            "backend": backend.name,
            "one_host": backend.topology.one_host,
            "hosts": [info.host.name for info in backend.topology.ranks],
            "reason": backend.decision.candidate("onehost").reason,
            "sum": backend.all_reduce(torch.tensor([rank])).item(),
        }
comm.close()
dist.destroy_process_group()
print(json.dumps(report))
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with an address each, 10.77.0.1 and 10.77.0.2, and a cable between them."""
    names = (f"comm-core-{os.getpid()}-a", f"comm-core-{os.getpid()}-b")
    if shutil.which("ip") is None:
        pytest.skip("no `ip` on this machine (Debian: iproute2), so no network namespaces can be made")
    try:
        run("unshare", "--uts", "--ipc", "--mount", "--net", "true")
        with contextlib.ExitStack() as stack:
            for name in names:
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "delete", name)
            run(
                "ip",
                "link",
                "add",
                "veth0",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                "veth0",
                "netns",
                names[1],
            )
            for number, name in enumerate(names, 1):
                run("ip", "-n", name, "address", "add", f"10.77.0.{number}/30", "dev", "veth0")
                run("ip", "-n", name, "link", "set", "veth0", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
            yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine refuses namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}")


def test_two_real_hosts_are_seen_as_two_and_a_group_inside_one_keeps_its_backend(
    hosts: tuple[str, str], tmp_path: Path
) -> None:
    metadata = tmp_path / "onehost-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onehost\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[comm_core.backends]\nonehost = onehost_plugin\n")
    (tmp_path / "onehost_plugin.py").write_text(PLUGIN)
    (tmp_path / "worker.py").write_text(WORKER)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": "veth0", "PYTHONPATH": path, "COMM_CORE_CONTROL_TIMEOUT_S": "120"}
    # The two ranks of a host share one set of namespaces.
    host = textwrap.dedent("""
        hostname "$1"
        mount -t tmpfs tmpfs /dev/shm
        "$2" "$3" "$4" > "$6/rank$4" &
        "$2" "$3" "$5" > "$6/rank$5" && wait $!
    """)
    with contextlib.ExitStack() as stack:
        started = []
        for number, namespace in enumerate(hosts):
            ranks = (str(2 * number), str(2 * number + 1))
            shell = ["unshare", "--uts", "--ipc", "--mount", "sh", "-c", host, "sh", f"host{number}", sys.executable]
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *shell, str(tmp_path / "worker.py"), *ranks, str(tmp_path)],
                env=environ,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    reports = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(4)]
    for report in reports:
        assert report["world"] == {
            "backend": "torch_distributed",
            "one_host": False,
            "hosts": ["host0", "host0", "host1", "host1"],
            "reason": "its ranks are on 2 hosts",
            "sum": 6,
        }
    for rank, name, total in ((0, "one", 1), (1, "one", 1), (2, "other", 5), (3, "other", 5)):
        assert reports[rank][name]["one_host"]
        assert (reports[rank][name]["backend"], reports[rank][name]["sum"]) == ("onehost", total)
    for rank in (1, 3):
        assert not reports[rank]["across"]["one_host"]
        assert (reports[rank]["across"]["backend"], reports[rank]["across"]["sum"]) == ("torch_distributed", 4)


def test_two_hosts_by_evidence() -> None:
    """What the namespaces show, without them: equal names make no host, equal kernels neither."""

    def group(*hosts: Host) -> Topology:
        return Topology.of(RankInfo(rank, host) for rank, host in enumerate(hosts))

    here = Host("node", "boot ipc 1 shm 1", "boot")
    assert group(here, here).one_host
    assert not group(here, Host("node", "boot ipc 2 shm 1", "boot")).one_host
    assert not group(here, Host("node", "other ipc 1 shm 1", "other")).one_host
