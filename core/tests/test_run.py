"""`comm-core run`: unchanged programs of torch.distributed, started by torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comm_core import cli

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
HELPER = "def double(x):\n    return 2 * x\n"
PROGRAM = """
import sys

import torch
import torch.distributed as dist
from helper import double
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh

if __name__ == "__main__":
    how, *rest = sys.argv[1:]
    dist.Backend.register_backend("other", dist.ProcessGroupGloo, devices=["cpu"])
    if how == "mesh":
        group = init_device_mesh("cpu", (2,)).get_group()
    else:
        init_process_group(backend=None if how == "none" else how)
        group = None
    x = torch.tensor([double(1.0 + dist.get_rank())])
    dist.all_reduce(x, group=group)
    if dist.get_rank() == 0:
        print(dist.get_backend(group), x.item(), __file__.rpartition("/")[2], rest)
    dist.destroy_process_group()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "comm_core", "run", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("how", ["gloo", "none", "cpu:gloo,cuda:nccl", "mesh"])
def test_a_program_runs_on_comm(folder: Path, how: str) -> None:
    done = run(folder, "program.py", how, "--flag", "-m")
    assert done.stdout == "comm 6.0 program.py ['--flag', '-m']\n", done.stderr
    assert done.returncode == 0


def test_a_module_runs_on_comm(folder: Path) -> None:
    done = run(folder, "-m", "program", "gloo")
    assert done.stdout == "comm 6.0 program.py []\n", done.stderr


def test_a_backend_that_isnt_torchs_own_stays(folder: Path) -> None:
    done = run(folder, "program.py", "other")
    assert done.stdout == "other 6.0 program.py []\n", done.stderr
    assert "the program asks for the backend 'other'" in done.stderr


def test_what_isnt_a_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "nowhere.py"])
    assert ended.value.code == 2
    assert "nowhere.py isn't a file" in capsys.readouterr().err
