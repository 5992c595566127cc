"""What `comm-core demo` sums."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from comm_core import cli
from comm_core.cli import demo


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


def test_the_record_is_json() -> None:
    done = run_command("demo", "--json")
    record = json.loads(done.stdout)
    assert record["ranks"] == 2
    assert record["decision"]["candidates"][-1]["name"] == "torch_distributed"
    assert {(row["nbytes"], row["dtype"]) for row in record["rows"]} == set(
        itertools.product(demo._NBYTES, demo._DTYPES)
    )
    assert all(row["time_us"] > 0 and row["torch_us"] > 0 and row["wrong"] == 0 for row in record["rows"])


def test_a_reader_that_ends_early_ends_the_job_quietly() -> None:
    with start_command("demo") as job:
        assert job.stdout is not None
        job.stdout.readline()
        job.stdout.close()  # as `head` does
        assert job.stderr is not None
        assert "Traceback" not in job.stderr.read()
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


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")])
def test_a_variable_that_cant_be_read_is_one_line(launcher: tuple[str, ...]) -> None:
    done = run_command("demo", launcher=launcher, COMM_CORE_WAIT_TIMEOUT_S="abc")
    assert done.returncode == (1 if launcher else 2)  # torchrun's own status is 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("comm-core: ")]
    assert lines == [
        "comm-core: COMM_CORE_WAIT_TIMEOUT_S='abc' can't be read: could not convert string to float: 'abc'"
    ]


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


def run_command(*arguments: str, launcher: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess[str]:
    with start_command(*arguments, launcher=launcher, environ=environ) as job:
        out, err = job.communicate(timeout=240)
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def start_command(
    *arguments: str,
    launcher: tuple[str, ...] = (),
    environ: Mapping[str, str] | None = None,
    start_new_session: bool = False,
) -> subprocess.Popen[str]:
    left_out = ("COMM_CORE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "comm_core", *arguments],
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )
