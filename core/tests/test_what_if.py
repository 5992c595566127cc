"""`comm-core explain` about machines that aren't at hand, and about one message."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comm_core import cli
from comm_core._plan.decide import Slate
from comm_core._plan.explain import explain_message, rules_by_size
from comm_core._plan.routes import Offer
from comm_core._plugins import discovery, installed
from comm_core._topologies import describe_topologies, load_topologies
from comm_core.topology import Topology
from comm_core.types import TERMINAL, Range
from harness import install

PLUGIN = """\
import sys

import comm_core as comm
from comm_core import eligibility

plugin = sys.modules[__name__]
COMM_HOOK_API = (1, 0)

@comm.hookimpl
def probe():
    {probe}

@comm.hookimpl
def is_available(topology):
    reason = eligibility.missing_dependency(topology, "mine")
    if reason:
        return comm.Unavailable(reason)
    assert {{info.plugins["mine"] for info in topology.ranks}} == {{"1.0"}}
    facts = [info.facts["mine"] for info in topology.ranks]
    return comm.Available(300, (comm.Range("all_reduce", max_nbytes=facts[-1]["most"]),))

@comm.hookimpl
def all_reduce(session, tensor, out):
    raise NotImplementedError
"""

Explain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], Explain]]:
    """A function that installs the one backend `mine` with this body of `probe`, and returns the command."""
    metadata, folder = installed.metadata, tmp_path / "site"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(
        installed,
        "metadata",
        SimpleNamespace(distributions=lambda **kwargs: metadata.distributions(path=[str(folder)], **kwargs)),
    )
    for name in ("COMM_CORE_BACKENDS", "COMM_CORE_DISABLE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["explain", *arguments])
        return status, *capsys.readouterr()

    def with_probe(body: str) -> Explain:
        install(folder, "mine", PLUGIN.format(probe=body))
        return run

    discovery.reset()
    yield with_probe
    discovery.reset()
    sys.modules.pop("mine", None)


def without_spaces(text: str) -> list[str]:
    """The lines, with one space between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_facts_of_this_host_are_assumed_and_the_output_says_so(explain: Callable[[str], Explain]) -> None:
    status, out, err = explain('return {"missing": None, "most": 4096}')("--topology", "hgx-h200")
    assert (status, err) == (0, "")
    lines = without_spaces(out)
    assert lines[0] == "hgx-h200, with the backends installed here: 8 ranks on one host, NVIDIA H200"
    assert "mine 1.0 300 serves available on every rank" in lines
    assert lines[-1] == "The topology has no facts of mine: those of this host are assumed on every rank."


def test_what_is_missing_here_is_assumed_to_be_there_and_the_output_says_so(
    explain: Callable[[str], Explain],
) -> None:
    run = explain('return {"missing": "there is no compiler", "most": 4096}')
    status, out, _ = run("--topology", "hgx-h200")
    assert status == 0
    assert "mine 1.0 300 serves available on every rank" in without_spaces(out)
    assert without_spaces(out)[-2:] == [
        "These can't be used on this host, and are assumed to be usable there:",
        "mine there is no compiler",
    ]
    data = json.loads(run("--topology", "hgx-h200", "--json")[1])
    assert data["assumed"] == {"mine": {"missing": None, "most": 4096}}
    assert data["missing_here"] == {"mine": "there is no compiler"}
    assert Topology.from_json(data["topology"]) == load_topologies()["hgx-h200"]


def test_recorded_facts_are_kept_also_those_of_some_ranks(explain: Callable[[str], Explain], tmp_path: Path) -> None:
    run = explain('return {"missing": None, "most": 4096}')
    data: Any = load_topologies()["cpus-3-ranks"].to_json()
    path = tmp_path / "recorded.json"
    for facts, answer in (
        ([{"missing": None, "most": 64}] * 3, "300 serves available on every rank"),
        ([{"missing": "no compiler there", "most": 64}] * 3, "- unavailable on rank 0 no compiler there"),
        ([{"missing": None, "most": 64}, None], "- unavailable rank 1 didn't report whether it has the native code"),
    ):
        for rank, reported in zip(data["ranks"], facts, strict=False):
            rank["facts"] = {} if reported is None else {"mine": reported}
            rank["plugins"] = {"mine": "1.0"}
        path.write_text(json.dumps(data), encoding="utf-8")
        _, out, err = run("--topology", str(path))
        assert err == ""
        assert f"mine 1.0 {answer}" in without_spaces(out)
        assert "assumed" not in out
        assert ("mine up to 64 B" in out) == ("serves" in answer)


def test_a_probe_that_fails_here_leaves_its_backend_out(explain: Callable[[str], Explain]) -> None:
    status, out, _ = explain('raise RuntimeError("no driver")')("--topology", "dgx-h100")
    assert status == 0
    assert "probe() failed: RuntimeError: no driver" in out
    assert "assumed" not in out


def test_a_named_backend_that_cannot_serve_there_is_status_1(
    explain: Callable[[str], Explain], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = explain('return {"missing": None, "most": 4096}')
    for named, status in (("mine", 0), ("other", 1), ("mine,other", 1), (TERMINAL, 0)):
        monkeypatch.setenv("COMM_CORE_BACKENDS", named)
        assert run("--topology", "hgx-h200", "--size", "8")[0] == run("--topology", "hgx-h200")[0] == status


def test_the_machines_are_listed_with_a_line_each(explain: Callable[[str], Explain]) -> None:
    run = explain("return {}")
    status, out, err = run("--list")
    assert (status, err) == (0, "")
    assert dict(line.split(maxsplit=1) for line in out.splitlines()) == describe_topologies()
    assert max(map(len, out.splitlines())) <= 100
    data = json.loads(run("--list", "--json")[1])
    assert data["schema"] == 1
    assert [(item["name"], Topology.from_json(item["topology"])) for item in data["topologies"]] == list(
        load_topologies().items()
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hgx-h20O", "no machine is named 'hgx-h20O', and there is no such file; did you mean hgx-h20?"),
        ("my\x1bmachine", "no machine is named 'my?machine', and there is no such file; see comm-core explain --list"),
    ],
)
def test_an_unknown_machine_is_refused_in_words(name: str, said: str, explain: Callable[[str], Explain]) -> None:
    status, out, err = explain("return {}")("--topology", name)
    assert (status, out) == (1, "")
    assert err.replace("\\x1b", "?") == f"comm-core: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("--size", "4K"), "all_reduce of 4 KiB, eager, cuda, bfloat16: mine"),
        (("--size", "4098", "--mode", "graph"), "all_reduce of 4098 B, graph, cuda, bfloat16: torch_distributed"),
        (
            ("--size", "1m", "--device", "cpu", "--dtype", "int8"),
            "all_reduce of 1 MiB, eager, cpu, int8: torch_distrib",
        ),
        (
            ("--size", "64", "--op", "fused", "--mode", "graph", "--dtype", "float32"),
            "all_reduce_add_rms_norm of 64 B, graph, cuda, float32: core's norm after an all_reduce by mine",
        ),
        (
            ("--size", "64", "--op", "fused_quant"),
            "all_reduce_add_rms_norm_quant of 64 B, eager, cuda, bfloat16: core's quantisation after core's norm",
        ),
    ],
)
def test_one_line_says_who_serves_a_message(
    arguments: tuple[str, ...], answer: str, explain: Callable[[str], Explain]
) -> None:
    run = explain('return {"missing": None, "most": 4096}')
    status, out, err = run("--topology", "hgx-h200", *arguments)
    assert status == 0
    (line,) = out.splitlines()
    assert line.startswith(answer)
    assert "assumed" in err
    _, out, err = run("--topology", "hgx-h200", "--json", *arguments)
    message = json.loads(out)["message"]
    assert (err, message["nbytes"] > 0) == ("", True)
    assert (message["rules"][-1]["backend"] == "mine") == line.endswith("bfloat16: mine")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "fused"), "--op: give --size, too"),
        (("--mode", "graph", "--device", "cpu"), "--mode, --device: give --size, too"),
        (("--size", "64T"), "expected bytes, such as 8, 64K or 1M; got '64T'"),
        (("--size", "0"), "expected bytes"),
        (("--size", "9" * 19), "expected bytes"),
        (("--size", "9"), "--size 9: no whole number of bfloat16 elements"),
        (
            ("--size", "8", "--dtype", "int8", "--op", "fused"),
            "no messages of all_reduce_add_rms_norm, eager, cpu, int8",
        ),
        (("--size", "8", "--mode", "graph"), "no messages of all_reduce, graph, cpu, bfloat16"),
        (("--size", "8", "--device", "cuda"), "its tensors are on cpu"),
    ],
)
def test_a_message_that_cannot_be_is_a_usage_error(
    arguments: tuple[str, ...], said: str, explain: Callable[[str], Explain], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        explain('return {"missing": None, "most": 4096}')("--topology", "cpus-8-ranks", *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_conditions_on_the_shape_are_named_in_order() -> None:
    ranges = (
        Range("all_reduce_add_rms_norm", max_nbytes=1024, max_tokens=4, hidden_multiple=8),
        Range("all_reduce_add_rms_norm", max_nbytes=64),
    )
    made = Slate((Offer("fast", 300, ranges), Offer("plain", 100, (Range("all_reduce"),)))).decision(("cuda",))
    route = made.route("all_reduce_add_rms_norm", "eager", "cuda", "float16")
    what = "eager, cuda, float16"
    for nbytes, answer in {
        64: "64 B, {}: fast with up to 4 tokens, hidden size a multiple of 8, else fast",
        1024: "1 KiB, {}: fast with up to 4 tokens, hidden size a multiple of 8, else core's norm after an all_reduce "
        "by plain",
        # Not a multiple of 8 elements, whatever the shape.
        72 * 2 + 4: "148 B, {}: core's norm after an all_reduce by plain",
        2048: "2 KiB, {}: core's norm after an all_reduce by plain",
    }.items():
        assert explain_message(made, route, nbytes) == f"all_reduce_add_rms_norm of {answer.format(what)}"
        for num_tokens in (1, 2, 4, 8):
            if nbytes // 2 % num_tokens == 0:
                served = route.backend_for(nbytes, num_tokens, nbytes // 2 // num_tokens)
                assert served in {rule.backend for rule in rules_by_size(route, nbytes)}
    assert [rule.backend for rule in rules_by_size(route, 64)] == ["fast", "fast"]
    assert [rule.backend for rule in rules_by_size(route, 2048)] == [TERMINAL]
