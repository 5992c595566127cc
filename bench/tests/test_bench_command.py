"""The command `comm-core bench` as users run it: by itself, as ranks of a job, interrupted."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import pytest
from bench_faults import AT, PLAIN, Fused, LastElement, name_of, plant
from bench_ranks import HIDDEN_SIZE, schema
from comm_bench.cases import OPS
from comm_core.types import TERMINAL
from command_ranks import printed

if TYPE_CHECKING:
    from harness import Ranks


def environment(path: Sequence[Path] = ()) -> dict[str, str]:
    left_out = ("COMM_CORE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    folders = [
        *map(str, path),
        str(Path(__file__).parent),
        str(Path(harness.__file__).parent),
        *filter(None, [environ.get("PYTHONPATH")]),
    ]
    environ |= {"PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return environ | {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}


def bench(*arguments: str, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "comm_core", "bench", *arguments],
        env=environment(path),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def check_document(document: dict[str, Any], ranks: int, ops: Sequence[str], calls: int) -> None:
    """Validate a document against the schema, and check the tables of a run over two sizes."""
    schema().validate(document)
    assert document["machine"]["ranks"] == ranks
    assert document["machine"]["device_type"] == "cpu"
    assert document["clocks"] == {"before": [{}] * ranks, "after": [{}] * ranks}
    assert document["dropped"] == []
    expected = {(op, place, nbytes) for op in ops for place in ("out", "in") for nbytes in (1024, 4096)}
    for name in (TERMINAL, "limit:copy", name_of(Fused)):
        rows = [row for row in document["rows"] if row["name"] == name]
        assert {(row["op"], row["place"], row["nbytes"]) for row in rows} == expected
        assert len(rows) == len(expected)
        for row in rows:
            assert len(row["times_us"]) == 7
            assert row["calls"] == calls
            assert row["busbw"] == pytest.approx(row["nbytes"] / row["time_us"] / 1e3 * 2 * (ranks - 1) / ranks)
            assert row["wrong"] == (None if row["kind"] == "limit" else 0)
    for row in document["rows"]:
        if row["kind"] == "terminal":
            assert (row["ratio"]["low"], row["ratio"]["high"]) == (1, 1)
    tables = {(each["name"], each["table"]["op"], each["table"]["place"]) for each in document["summaries"]}
    assert tables >= {(name_of(Fused), op, place) for op in ops for place in ("out", "in")}


SMALL = ("-b", "1K", "-e", "4K", "-f", "4", "-n", "2", "-w", "1", "--repetitions", "7")


def test_the_command_on_cpus(tmp_path: Path) -> None:
    """With a faulty backend, and without numpy, which torch doesn't install; torch looks for it when it is imported."""
    path = tmp_path / "x.json"
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "numpy.py").write_text("raise ModuleNotFoundError('blocked')\n")
    done = bench(
        *("--nproc", "2", *SMALL, "--op", "both", "--hidden", str(HIDDEN_SIZE), "--json", str(path)),
        path=[*plant(tmp_path, [Fused, LastElement]), tmp_path / "without"],
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    document = json.loads(path.read_text())
    check_document(document, 2, OPS[:2], 2)
    wrong = {(row["name"], row["nbytes"]) for row in document["rows"] if row["wrong"]}
    assert wrong == {(name_of(LastElement), AT)}
    assert document["wrong"] == sum(row["wrong"] or 0 for row in document["rows"])
    lines = done.stdout.splitlines()
    titles = [f"# {op}, eager, {place}" for op in OPS[:2] for place in ("out of place", "in place")]
    assert [line for line in lines if line in titles] == titles
    shown = [line.split() for line in lines if line and not line.startswith("#")]
    # The printed rows are the recorded ones, in the same order.
    assert [(row[0], row[2], row[3], row[4]) for row in shown] == [
        (str(row["nbytes"]), row["dtype"], row["name"], f"{row['time_us']:.2f}") for row in document["rows"]
    ]
    assert f"# Wrong elements: {document['wrong']}" in lines


def test_the_command_as_three_ranks_of_a_job(ranks: Ranks, tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    pytest.importorskip("matplotlib")
    arguments = ["bench", *SMALL, "--json", "--plot", str(picture)]
    path = [plant(tmp_path, [Fused])] * 3
    first, *others = ranks.run(printed, "comm_bench.cli", arguments, world_size=3, installed=True, path=path)
    status, out, err = first
    assert status == 0, err
    assert [other[:2] for other in others] == [(0, "")] * 2
    # stdout has only JSON.
    document = json.loads(out)
    check_document(document, 3, [PLAIN], 2)
    assert document["wrong"] == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    # Two tables, each with a row of two panels.
    assert 1000 < width < 4000
    assert 800 < height < 3000
    assert len(data) > 50_000


def test_an_unknown_contender_is_a_usage_error_of_one_rank(ranks: Ranks) -> None:
    (status, out, err), other = ranks.run(printed, "comm_bench.cli", ["bench", "--backends", "nosuch"], installed=True)
    assert (status, out) == (2, "")
    assert err.count("error: no installed backend or peer has the name nosuch; choose from ") == 1
    assert other == (2, "", "")


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    command = [sys.executable, "-m", "comm_core", "bench", "--repetitions", "7", "--json", str(path)]
    running = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.lstrip()[:1].isdigit():  # a row
            break
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, stderr = running.communicate(timeout=240)
    assert running.returncode == 130
    assert len(stderr.splitlines()) <= 1  # that the machine is busy
    document = json.loads(path.read_text())
    schema().validate(document)
    assert document["partial"]
    assert document["rows"]
