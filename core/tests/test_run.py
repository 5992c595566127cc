"""`comm-core run`: unchanged programs of torch.distributed, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comm_core import cli

HELPER = "def double(x):\n    return 2 * x\n"
# Makes the default group in several ways, one after another. The first one uses torchrun's store by torch's own means;
# the others may not meet its keys.
PROGRAM = """
import os
import sys

import torch
import torch.distributed as dist
from helper import double
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh

if __name__ == "__main__":
    hows, *rest = sys.argv[1:]
    dist.Backend.register_backend("other", dist.ProcessGroupGloo, devices=["cpu"])
    options = {}
    for how in hows.split("+"):
        if how == "mesh":
            group = init_device_mesh("cpu", (2,)).get_group()
        else:
            init_process_group(backend=None if how == "none" else how, **options)
            group = None
        x = torch.tensor([double(1.0 + dist.get_rank())])
        dist.all_reduce(x, group=group)
        rank, size = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            print(how, dist.get_backend(group), x.item(), __file__.rpartition("/")[2], rest, flush=True)
        dist.destroy_process_group()
        if size > 1:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            options = {"store": dist.PrefixStore("after " + how, store), "rank": rank, "world_size": size}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def run(folder: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_program_runs_on_comm_unless_its_backend_isnt_torchs_own(folder: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    hows = ["mesh", "gloo", "none", "cpu:gloo,cuda:nccl", "other"]
    done = run(folder, *torchrun, "-m", "comm_core", "run", "program.py", "+".join(hows), "--flag", "-m")
    assert done.stdout.splitlines() == [
        f"{how} {'other' if how == 'other' else 'comm'} 6.0 program.py ['--flag', '-m']" for how in hows
    ], done.stderr
    assert done.returncode == 0
    assert "the program asks for the backend 'other'" in done.stderr
    assert "for the backend 'gloo'" not in done.stderr


def test_a_module_runs_on_comm(folder: Path) -> None:
    job = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run(folder, "-m", "comm_core", "run", "-m", "program", "gloo", **job)
    assert done.stdout == "gloo comm 2.0 program.py []\n", done.stderr


def test_what_isnt_a_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "nowhere.py"])
    assert ended.value.code == 2
    assert "nowhere.py isn't a file" in capsys.readouterr().err
