"""`comm-core stats`: what an unchanged program's all-reduces did, printed as its handles close."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import comm_core as comm
import pytest
from comm_core import cli

PROGRAM = """
import sys, time

import comm_core as comm
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
backend = comm.get_backend(backends=["shm"])
alone = comm.get_backend([dist.new_group([r]) for r in range(2)][rank])
alone.all_reduce(torch.ones(3))
for _ in range(7):
    if rank == 1:
        time.sleep(0.02)
    backend.all_reduce(torch.ones(1000))
if sys.argv[1] == "close":
    comm.close()
    print("closed", flush=True)
    dist.destroy_process_group()
else:
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("close", 0), ("exit", 1)])  # torchrun's own status
def test_calls_are_printed_by_the_first_rank_and_waits_by_each(tmp_path: Path, how: str, status: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "comm_core", "stats", "program.py", how]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout == ("closed\nclosed\n" if how == "close" else "")
    world = re.search(r"rank 0 of group '0' \(ranks 0,1\)\n((?:  .*\n)+)", done.stderr)
    assert world is not None, done.stderr
    assert re.search(r"^  all_reduce +eager +cpu +float32 +shm +7 +28000 B$", world[1], re.MULTILINE)
    # Rank 0 waited for the other one, which slept.
    assert re.search(r"^  rank 1 +shm +\d+ +\d{5,} +\d{4,}$", world[1], re.MULTILINE)
    assert len(re.findall(r"^  all_reduce .* torch_distributed +1 +12 B$", done.stderr, re.MULTILINE)) == 2


def test_a_plugin_that_cant_tell_its_waits_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import comm_core as comm, torch\ncomm.get_backend().all_reduce(torch.ones(5))\n")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    from comm_core._handle.backend import Backend

    def waits(_: Backend) -> None:
        raise ValueError("no page")

    monkeypatch.setattr(Backend, "waits", waits)
    assert cli.main(["stats", str(program)]) == 0
    comm.close()
    printed = capsys.readouterr().err
    assert "rank 0 of this process, alone\n" in printed
    assert "  the waits can't be read: ValueError: no page\n" in printed


def test_what_isnt_a_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["stats", "nowhere.py"])
    assert ended.value.code == 2
    assert "nowhere.py isn't a file" in capsys.readouterr().err
