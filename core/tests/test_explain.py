from __future__ import annotations

from pathlib import Path

import pytest
from comm_core._plan.decide import Slate
from comm_core._plan.explain import explain, size, table
from comm_core._plan.routes import Offer
from comm_core.cli import main
from comm_core.topology import Device, Host, RankInfo, Topology
from comm_core.types import DTYPES, OPS, Candidate, Range
from hypothesis import given
from hypothesis import strategies as st

UNITS = {"B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (4096, "4 KiB"),
        (4100, "4100 B"),
        (1536, "1536 B"),
        (1 << 60, "1048576 TiB"),
    ],
)
def test_sizes_are_short(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@given(st.integers(0, 1 << 62))
def test_sizes_are_exact(nbytes: int) -> None:
    number, unit = size(nbytes).split()
    assert int(number) * 1024 ** UNITS[unit] == nbytes


def test_columns_are_aligned_and_lines_end_where_their_text_does() -> None:
    assert table([("a", "bb"), ("ccc", "x"), ("d", "")]) == "a    bb\nccc  x\nd"
    numbers = [("name", "us", "ratio"), ("a", "1.5", "2.25*"), ("b", "120.0", "-")]
    assert table(numbers) == "name     us  ratio\na       1.5  2.25*\nb     120.0      -"


def a_topology() -> Topology:
    device = Device("cuda", "GPU-1", "NVIDIA H100")
    hosts = (Host("one", "1"), Host("one", "1"), Host("two", "2"))
    return Topology.of([RankInfo(4 * rank, host, device) for rank, host in enumerate(hosts)], ("cuda",))


def test_an_explanation_has_every_backend_with_its_reason_and_every_route() -> None:
    small = Range("all_reduce", dtypes=("bfloat16",), min_nbytes=16, max_nbytes=65536, multiple_nbytes=16)
    fused = Range("all_reduce_add_rms_norm", max_tokens=128, hidden_multiple=8)
    made = Slate(
        (Offer("fast", 300, (small, fused), "1.2"), Offer("plain", 100, (Range("all_reduce", min_nbytes=4096),))),
        (
            Candidate("broken", "failed", "no compiler", 2, 200, "0.1"),
            Candidate("other", "blocked", "COMM_CORE_DISABLE names it"),
        ),
    )
    lines = explain("group 'tp' (ranks 0,4,8)", a_topology(), made.decision(("cuda",))).splitlines()
    assert lines[0] == "group 'tp' (ranks 0,4,8): 3 ranks on 2 hosts, NVIDIA H100"
    words = [line.split() for line in lines]
    assert ["fast", "1.2", "300", "serves", "available", "on", "every", "rank"] in words
    assert ["broken", "0.1", "200", "failed", "rank", "2", "(8", "in", "the", "job):", "no", "compiler"] in words
    assert ["other", "-", "blocked", "COMM_CORE_DISABLE", "names", "it"] in words
    assert ["torch_distributed", "0", "serves", "always", "available"] in words
    text = "\n".join(" ".join(line) for line in words)
    assert (
        "all_reduce graph cuda bfloat16 "
        "fast 16 B to 64 KiB, multiples of 16 B; plain from 4 KiB; torch_distributed any size"
    ) in text
    assert (
        "all_reduce_add_rms_norm eager cuda all "
        "fast any size, up to 128 tokens, hidden size a multiple of 8; torch_distributed any size"
    ) in text


def test_kinds_of_message_with_one_route_share_a_line() -> None:
    lines = explain(
        "this process, alone", Topology.of([RankInfo(0, Host("one", "1"))]), Slate(()).decision(("cpu",))
    ).splitlines()
    assert lines[0] == "this process, alone: 1 rank on one host, CPU tensors"
    assert lines[-3].split() == ["all_reduce", "eager", "cpu", "all", "torch_distributed", "any", "size"]
    for line, op in zip(lines[-2:], OPS[1:], strict=True):
        assert line.split()[:4] == [op, "eager", "cpu", "all"]


def test_a_route_of_some_dtypes_lists_them() -> None:
    offer = Offer("a", 300, (Range("all_reduce", dtypes=("int8", "float16")),))
    lines = explain("g", a_topology(), Slate((offer,)).decision(("cpu",))).splitlines()
    (line,) = [line.split() for line in lines if "a any size" in line]
    assert line[:4] == ["all_reduce", "eager", "cpu", "float16,int8"]
    (line,) = [line.split() for line in lines if line.startswith("all_reduce ") and "a any size" not in line]
    assert line[3] == ",".join(dtype for dtype in DTYPES if dtype not in ("int8", "float16"))


def test_a_rank_of_the_same_number_in_the_job_is_named_once() -> None:
    topology = Topology.of([RankInfo(rank, Host("one", "1")) for rank in range(2)])
    text = explain("g", topology, Slate((), (Candidate("a", "unavailable", "no", 1),)).decision(("cpu",)))
    assert "rank 1: no" in text
    assert "in the job" not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "null",
        "5",
        "[]",
        "{}",
        "[" * 100_000,
        '{"schema": 1}',
        '{"schema": 1, "ranks": []}',
        '{"schema": 1, "ranks": [5]}',
        '{"schema": 1, "ranks": [{"global_rank": 0}]}',
        '{"topology": [1]}',
        '{"schema": "\\u001b[2J"}',
    ],
)
def test_a_file_that_isnt_a_topology_is_refused_in_words(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recorded\x1b.json"
    path.write_text(text, encoding="utf-8")
    assert main(["explain", "--topology", str(path)]) == 1
    error = capsys.readouterr().err.rstrip("\n")
    assert "recorded?.json isn't a recorded topology" in error
    assert error.isprintable()
