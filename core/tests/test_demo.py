"""What `comm-core demo` sums."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comm_core import cli
from comm_core.cli import demo

if TYPE_CHECKING:
    from harness import Ranks


@pytest.mark.parametrize("world_size", [2, 8, 16, 18, 64, 256])
@pytest.mark.parametrize("dtype", demo._DTYPES)
def test_sums_are_exact_and_ranks_differ(dtype: str, world_size: int) -> None:
    tensors = [demo._test_tensor(rank, world_size, 1024, dtype, torch.device("cpu")) for rank in range(world_size)]
    total = torch.stack(tensors).double().sum(0)
    assert torch.equal(total.to(tensors[0].dtype).double(), total)
    assert not torch.equal(tensors[0], tensors[1])


@pytest.mark.parametrize("nproc", ["0", "1"])
def test_fewer_than_two_processes_are_a_usage_error(capsys: pytest.CaptureFixture[str], nproc: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--nproc", nproc])
    assert ended.value.code == 2
    assert "start at least two" in capsys.readouterr().err


# With these a demo takes a moment rather than a minute.
NBYTES, BLOCK_NBYTES = (1 << 10, 64 << 10), 0


def record_of_a_rank() -> tuple[int, str]:
    """Run the demo in a rank of the current job; its exit status and its output."""
    out = io.StringIO()
    smaller = mock.patch.multiple(demo, _NBYTES=NBYTES, _BLOCK_NBYTES=BLOCK_NBYTES)
    with smaller, contextlib.redirect_stdout(out):
        status = demo._demo(dist.get_rank(), as_json=True)
    return status, out.getvalue()


def test_the_record_is_json(ranks: Ranks) -> None:
    (status, out), other = ranks.run(record_of_a_rank, installed=True)
    assert status == 0
    assert other == (0, "")
    record = json.loads(out)
    assert record["ranks"] == 2
    assert record["decision"]["candidates"][-1]["name"] == "torch_distributed"
    assert {(row["nbytes"], row["dtype"]) for row in record["rows"]} == set(itertools.product(NBYTES, demo._DTYPES))
    assert all(row["time_us"] > 0 and row["torch_us"] > 0 and row["wrong"] == 0 for row in record["rows"])


def test_a_reader_that_ends_early_ends_the_job_quietly(tmp_path: Path) -> None:
    # Python imports this module at its start, in the command and in its ranks. The second rank has ample time to find
    # that the first one has ended: the launcher can't end it by SIGTERM.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n\nif os.environ.get('RANK') == '1':\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with start_command("demo", environ={"PYTHONPATH": path}) as job:
        assert job.stdout is not None
        job.stdout.close()  # as `head` does
        assert job.stderr is not None
        err = job.stderr.read()
        assert len(err.splitlines()) <= 1, err  # that the machine is busy
        assert job.wait(timeout=120) == 1


@pytest.mark.parametrize("lines", [0, 3])
def test_ctrl_c_ends_the_job_quietly(lines: int) -> None:
    with start_command("demo", start_new_session=True) as job:
        assert job.stdout is not None
        for _ in range(lines):
            job.stdout.readline()
        if not lines:
            wait_for_a_rank_to_import_torch(job.pid)
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        out, err = job.communicate(timeout=120)
        assert job.returncode == 130, (out, err)
        assert "Traceback" not in err
        assert len(err.splitlines()) <= 1  # that the machine is busy


UNREADABLE = "comm-core: COMM_CORE_WAIT_TIMEOUT_S='abc' can't be read: could not convert string to float: 'abc'\n"


@pytest.mark.parametrize(("rank", "printed"), [(None, UNREADABLE), ("0", UNREADABLE), ("1", "")])
def test_a_variable_that_cant_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str | None, printed: str
) -> None:
    """For the command that starts a job, and in a job that torchrun started for one of the ranks."""
    monkeypatch.setenv("COMM_CORE_WAIT_TIMEOUT_S", "abc")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if rank is None:
        assert cli.main(["demo"]) == 2
    else:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as ended:
            cli.main(["demo"])
        assert ended.value.code == 2
    assert capsys.readouterr() == ("", printed)


def wait_for_a_rank_to_import_torch(command: int) -> None:
    """Wait until a child of the command's process has mapped torch's library."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, IndexError):  # no process, or one that has just ended
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                # Before a child executes its program, it has its parent's command line and libraries.
                program = b"comm_core.cli" in (folder / "cmdline").read_bytes()
                if program and int(stat[1]) == command and "libtorch_cpu" in (folder / "maps").read_text():
                    return
        time.sleep(0.01)
    raise AssertionError("no rank imports torch")


def start_command(
    *arguments: str, environ: Mapping[str, str] | None = None, start_new_session: bool = False
) -> subprocess.Popen[str]:
    left_out = ("COMM_CORE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return subprocess.Popen(
        [sys.executable, "-m", "comm_core", *arguments],
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )
