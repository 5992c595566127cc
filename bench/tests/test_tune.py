"""`comm-core tune`: rules from measured times, and a table that later groups follow."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import jsonschema
import pytest
import torch.distributed as dist
from comm_bench import tune
from comm_bench.cases import OPS, BenchCase
from comm_bench.results import Row
from comm_bench.winners import RULE_COST, Comparison, choose, choose_variants, rules_of
from comm_core import cli
from comm_core.tuned import TunedTable, save_table
from comm_core.tuning import VariantChoice, parse_rules
from comm_core.types import MODES, TERMINAL, Decision, Route, Rule
from command_ranks import printed, searched, tuned
from harness import install
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from harness import Ranks

PLANNED = {1024: "a", 4096: "a", 16384: "b", 65536: "b"}


def validate(table: Any) -> None:
    """Compare a table's JSON with its schema."""
    text = importlib.resources.files("comm_bench").joinpath("table_schema.json").read_text(encoding="utf-8")
    jsonschema.Draft202012Validator(json.loads(text)).validate(table)


def comparisons(
    times: Mapping[str, Mapping[int, float]], planned: Mapping[int, str] = PLANNED, spread: float = 1.0
) -> list[Comparison]:
    """Choices from each backend's time by size; every other repetition takes `spread` times as long."""
    return [
        Comparison(
            OPS[0],
            "eager",
            nbytes,
            planned[nbytes],
            {
                name: tuple(of_size[nbytes] * (spread if number % 2 else 1) for number in range(7))
                for name, of_size in times.items()
                if nbytes in of_size
            },
        )
        for nbytes in planned
    ]


def chosen(*args: Any, **kwargs: Any) -> list[str]:
    return list(map(str, choose(comparisons(*args, **kwargs), "cpu")))


def all_sizes(time_us: float) -> dict[int, float]:
    return dict.fromkeys(PLANNED, time_us)


@pytest.mark.parametrize(
    ("times", "rules"),
    [
        ({"a": all_sizes(5), "b": all_sizes(5)}, []),
        # What is planned is the fastest.
        ({"a": {1024: 5, 4096: 5, 16384: 9, 65536: 9}, "b": {1024: 9, 4096: 9, 16384: 5, 65536: 5}}, []),
        ({"a": all_sizes(5), "b": all_sizes(10)}, ["a:all_reduce:10241-inf:eager:cpu:inf"]),
        ({"a": all_sizes(10), "b": all_sizes(5)}, ["b:all_reduce:0-10K:eager:cpu:inf"]),
        ({"a": all_sizes(10), "b": all_sizes(10), "c": all_sizes(5)}, ["c:all_reduce:eager:cpu:inf"]),
        # The change comes a size earlier.
        ({"a": all_sizes(5), "b": {1024: 9, 4096: 3, 16384: 3, 65536: 3}}, ["b:all_reduce:2561-10K:eager:cpu:inf"]),
        # A gain of 2 % at one size isn't worth a rule.
        ({"a": {1024: 5, 4096: 5, 16384: 4.9}, "b": all_sizes(5)}, []),
        # A loss of 0.5 % at one size is within the noise; a rule with one of 5 % would be a bad one.
        (
            {"a": all_sizes(10), "b": all_sizes(10), "c": {**all_sizes(5), 4096: 10.05}},
            ["c:all_reduce:eager:cpu:inf"],
        ),
        (
            {"a": all_sizes(10), "b": all_sizes(10), "c": {**all_sizes(5), 4096: 10.5}},
            ["c:all_reduce:0-2560:eager:cpu:inf", "c:all_reduce:10241-inf:eager:cpu:inf"],
        ),
        # One that can't take a size isn't chosen there.
        ({"a": all_sizes(10), "b": all_sizes(10), "c": {4096: 5}}, ["c:all_reduce:2561-10K:eager:cpu:inf"]),
        # Where the planned one wasn't measured, nothing is known.
        ({"a": {1024: 5}, "b": all_sizes(1)}, ["b:all_reduce:0-2560:eager:cpu:inf"]),
    ],
)
def test_a_rule_stands_where_another_backend_is_faster(times: dict[str, dict[int, float]], rules: list[str]) -> None:
    assert chosen(times) == rules


def test_a_gain_within_the_noise_is_none() -> None:
    times = {"a": all_sizes(10), "b": all_sizes(9)}
    assert chosen(times) == ["b:all_reduce:0-10K:eager:cpu:inf"]
    # Noisy times: the intervals have gains and losses.
    noisy = comparisons(times)
    noisy = [
        Comparison(c.op, c.mode, c.nbytes, c.planned, {"a": c.times_us["a"], "b": (9, 11, 9, 11, 9, 11, 9)})
        for c in noisy
    ]
    assert choose(noisy, "cpu") == []


times_of = st.dictionaries(
    st.sampled_from("abcd"), st.dictionaries(st.sampled_from(list(PLANNED)), st.floats(1, 20), max_size=4), max_size=4
)


@given(times_of, st.lists(st.sampled_from("abcd"), min_size=4, max_size=4))
def test_rules_are_worth_it_apart_and_of_measured_backends(
    times: dict[str, dict[int, float]], planned: list[str]
) -> None:
    made = comparisons(times, dict(zip(PLANNED, planned, strict=True)))
    rules = choose(made, "cpu")
    for one in rules:
        covered = [c for c in made if one.min_nbytes <= c.nbytes <= (one.max_nbytes or 1 << 40)]
        assert sum(c.gain(one.backend) for c in covered) > RULE_COST
        assert all(one.backend in c.times_us for c in covered if c.planned != one.backend)
    ends = [(rule.min_nbytes, math.inf if rule.max_nbytes is None else rule.max_nbytes) for rule in rules]
    assert all(low > high for (_, high), (low, _) in itertools.pairwise(ends))
    # No single rule over any range would gain more than all of them.
    total = sum(
        c.gain(one.backend) for one in rules for c in made if one.min_nbytes <= c.nbytes <= (one.max_nbytes or 1 << 40)
    ) - RULE_COST * len(rules)
    for name in times:
        for first in range(4):
            for end in range(first + 1, 5):
                assert sum(c.gain(name) for c in made[first:end]) - RULE_COST <= total + 1e-9


def test_variants_are_chosen_like_backends_and_sizes_between_keep_the_table() -> None:
    times = {"a": {1024: 9, 4096: 5, 16384: 9, 65536: 9}, "b": {1024: 9, 4096: 9, 16384: 5, 65536: 9}}
    times["c"] = {1024: 5, 65536: 5}
    chosen = choose_variants(comparisons(times))
    assert chosen == [
        VariantChoice(OPS[0], "c", 0, 2560),
        VariantChoice(OPS[0], "c", 40961, None),
    ]
    # Neighbours with one variant are one choice.
    times["c"] |= {4096: 4.9, 16384: 4.9}
    assert choose_variants(comparisons(times)) == [VariantChoice(OPS[0], "c", 0, None)]


def row(name: str, op: str, nbytes: int, time_us: float, *, composed: bool = False) -> Row:
    shape = (nbytes // 2,) if op == OPS[0] else (nbytes // 8192, 4096)
    case = BenchCase(op, "graph", "out", "bfloat16", "cuda", shape)
    kind = "terminal" if name == TERMINAL else "backend"
    return Row(name, kind, case, 2, 10, 1, 0.0, 0.0, (time_us,) * 7, 0, composed=composed)


def test_a_fused_call_is_composed_where_that_is_faster() -> None:
    rules = {OPS[0]: (Rule("fast"), Rule("plain"), Rule(TERMINAL)), OPS[1]: (Rule("fast"), Rule(TERMINAL))}
    decision = Decision((), tuple(Route(op, mode, "cuda", "bfloat16", rules[op]) for op in OPS[:2] for mode in MODES))
    rows = []
    for nbytes, fast, plain, fused, of_fast, of_plain, of_terminal in (
        (8192, 2, 7, 3, 5, 9, 12),
        (1 << 20, 9, 7, 14, 15, 10, 16),
    ):
        rows += [row("fast", OPS[0], nbytes, fast), row("plain", OPS[0], nbytes, plain)]
        rows += [row(TERMINAL, OPS[0], nbytes, 11), row("fast", OPS[1], nbytes, fused)]
        rows += [row("fast2", OPS[1], nbytes, of_fast, composed=True)]
        rows += [row("plain", OPS[1], nbytes, of_plain, composed=True)]
        rows += [row(TERMINAL, OPS[1], nbytes, of_terminal, composed=True)]
    found, made = rules_of(rows, decision, "cuda")
    assert list(map(str, found)) == [
        "plain:all_reduce:528385-inf:graph:cuda:inf",
        f"{TERMINAL}:fused:528385-inf:graph:cuda:inf",
    ]
    # The composition that the rule would choose takes `plain`, to which the sum's rule gives such messages.
    (large,) = (choice for choice in made if choice.op == OPS[1] and choice.nbytes == 1 << 20)
    assert {name: times[0] for name, times in large.times_us.items()} == {"fast": 14, TERMINAL: 10}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_first_cases_cover_the_sizes(device_type: str, quick: bool) -> None:
    ops = OPS[:2] if device_type == "cuda" else OPS[:1]
    found = tune.cases(device_type, ops=ops, quick=quick)
    assert len(found) == len(set(found))
    assert {case.mode for case in found} == set(MODES if device_type == "cuda" else MODES[:1])
    sizes = [case.nbytes for case in found if case.op == OPS[0] and case.mode == "eager"]
    assert {min(sizes), max(sizes)} <= set(sizes[:6])
    # A message of less than a row isn't fused.
    assert all(case.shape[0] > 0 for case in found)
    # Variants are measured of the same sizes in one mode; some of fused messages in two shapes.
    alike = tune.messages(device_type, ops=ops, quick=quick)
    assert {len(each) for each in alike} == ({1, 2} if device_type == "cuda" and not quick else {1})
    mode = "graph" if device_type == "cuda" else "eager"
    assert [each[0] for each in alike] == [case for case in found if case.mode == mode]
    assert all(each[0].nbytes / 2 < case.nbytes <= each[0].nbytes for each in alike for case in each)


VARIED = """\
import sys
import time

import comm_core as comm
import torch.distributed as dist

plugin = sys.modules[__name__]
COMM_HOOK_API = (1, 0)
DELAYS_S = {"late": 0.01, "later": 0.02, "prompt": 0.0, "wrong": 0.0}

class Session:
    def __init__(self, context):
        self.context = context
        self.choices = ()

@comm.hookimpl
def is_available(topology):
    return comm.Available(900, (comm.Range("all_reduce", max_nbytes=65536),))

@comm.hookimpl
def connect(topology, context):
    return Session(context)

@comm.hookimpl
def all_reduce(session, tensor, out):
    variant = next((each.variant for each in session.choices if each.takes(tensor.nbytes)), "late")
    time.sleep(DELAYS_S[variant])
    out = tensor.clone() if out is None else out if out is tensor else out.copy_(tensor)
    dist.all_reduce(out, group=session.context.group)
    if variant == "wrong" and out.numel() > 4:
        out[4] += 1
    return out

@comm.hookimpl
def variants(session, op, nbytes, num_tokens):
    return OFFERED

@comm.hookimpl
def use_variants(session, choices):
    for each in choices:
        if each.variant not in DELAYS_S:
            raise ValueError(f"there is no variant {each.variant!r}")
    session.choices = choices

OFFERED = """


@pytest.mark.parametrize("nproc", ["1", "0"])
def test_one_rank_is_a_usage_error(nproc: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", "--nproc", nproc])
    assert ended.value.code == 2
    assert "a single rank has nothing to reduce" in capsys.readouterr().err


SLOW = """\
import sys
import time

import comm_core as comm
import torch.distributed as dist

plugin = sys.modules[__name__]
COMM_HOOK_API = (1, 0)

@comm.hookimpl
def is_available(topology):
    return comm.Available(900, [comm.Range("all_reduce", max_nbytes=65536, wire=wire) for wire in ("", "fp8")])

@comm.hookimpl
def all_reduce(session, tensor, out):
    assert session.wire == "", "exact sums are measured"
    time.sleep(0.01)
    out = tensor.clone() if out is None else out if out is tensor else out.copy_(tensor)
    dist.all_reduce(out, group=session.group)
    return out
"""


def test_a_variant_is_chosen_by_all_shapes_of_a_message(ranks: Ranks) -> None:
    shapes = ((2, 4096), (1, 7168), (1, 5000))
    # The fastest on average is slower than the one in use in the shortest message.
    choice = (VariantChoice(OPS[1], "prompt", 0, 24336), VariantChoice(OPS[1], "uneven", 24337))
    for tried, choices, shown in ranks.run(searched, shapes, 1000.0):
        assert tried.choices == {TERMINAL: choice}
        assert choices == choice
        measured = [(each.nbytes, each.planned) for each in tried.compared[TERMINAL]]
        assert measured == [(20000, "later"), (28672, "late"), (32768, "late")]
        for each in tried.compared[TERMINAL]:
            assert each.op == OPS[1]
            repetitions = {name: len(times) for name, times in each.times_us.items()}
            assert repetitions == dict.fromkeys(("late", "later", "prompt", "uneven"), 7)
        assert (tried.wrong, tried.unmeasured, shown) == (0, 0, [32768])
    for tried, choices, shown in ranks.run(searched, shapes, 0.0):
        assert (tried.choices, tried.compared, tried.unmeasured) == ({}, {}, 1)
        assert (tuple(choices), shown) == ((), [])


def followed(table: dict[str, Any]) -> tuple[tuple[VariantChoice, ...], str]:
    """The choices that the backend follows in a later group of this job, and the report.

    The table's rules are left out: the fastest variant and torch.distributed do the same, so either may serve.
    """
    tuned = dataclasses.replace(TunedTable.from_json(table), rules=())
    save_table(tuned, os.environ["COMM_CORE_CACHE_DIR"])
    dist.barrier()
    backend = comm.get_backend()
    choices: tuple[VariantChoice, ...] = backend._serving.sessions["varied"].value.choices
    comm.close()
    return choices, backend.explain()


def test_the_fastest_variant_is_found_and_used(ranks: Ranks, tmp_path: Path) -> None:
    path = [[install(tmp_path / "site", "varied", VARIED + '["late", "later", "unknown", "prompt"]\n')]] * 2
    env = {"COMM_CORE_CACHE_DIR": str(tmp_path / "cache"), "COMM_CORE_DISABLE": "shm"}
    run: dict[str, Any] = {"installed": True, "path": path, "env": env, "deadline_s": 240}
    (status, out, err), _ = ranks.run(tuned, 16 << 10, 5, **run)
    assert status == 0, err
    data = json.loads(out)
    validate(data)
    # On a busy machine a size may be undecided.
    chosen = TunedTable.from_json(data).variants["varied"]
    assert {(choice.op, choice.variant) for choice in chosen} == {(OPS[0], "prompt")}
    measured = data["provenance"]["variants"]["varied"]
    assert [each["nbytes"] for each in measured] == [1024, 4096, 16384]
    assert all((each["planned"], set(each["times_us"])) == ("late", {"late", "later", "prompt"}) for each in measured)
    assert {each["name"] for each in data["provenance"]["dropped"]} == {"unknown"}
    for choices, explained in ranks.run(followed, data, **run):
        assert choices == chosen
        assert f"Variants of varied that this table chooses:\n  {chosen[0]}" in explained


def test_a_variant_with_wrong_sums_leaves_no_table(ranks: Ranks, tmp_path: Path) -> None:
    path = [[install(tmp_path / "site", "varied", VARIED + '["late", "wrong"]')]] * 2
    env = {"COMM_CORE_CACHE_DIR": str(tmp_path / "cache"), "COMM_CORE_DISABLE": "shm"}
    (status, out, err), _ = ranks.run(tuned, 1 << 10, 5, installed=True, path=path, env=env, deadline_s=240)
    assert status == 1
    assert json.loads(out)["provenance"]["wrong"] > 0
    assert "elements were wrong, so no table is written" in err
    assert not (tmp_path / "cache" / "tuned").exists()


def test_later_groups_follow_what_was_measured(ranks: Ranks, tmp_path: Path) -> None:
    """A slow backend of high priority loses its sizes, in the table and then in a group's plan."""
    path = [[install(tmp_path / "site", "slow", SLOW)]] * 2
    env = {"COMM_CORE_CACHE_DIR": str(tmp_path / "cache"), "COMM_CORE_DISABLE": "shm"}
    # These variables aren't in force while the backends are measured.
    (status, out, err), other = ranks.run(
        tuned,
        256 << 10,
        installed=True,
        path=path,
        env={**env, "COMM_CORE_TUNE": "slow:0", "COMM_CORE_WIRE": "fp8"},
        deadline_s=240,
    )
    assert (status, other) == (0, (0, "", "")), err
    data = json.loads(out)
    validate(data)
    assert data["variants"] == data["provenance"]["variants"] == {}
    assert len(data["provenance"]["measured"]) > 2
    assert data["provenance"]["measured"][0]["planned"] == "slow"
    # On a busy machine a size may be undecided.
    assert data["rules"]
    rules = parse_rules(",".join(data["rules"]))
    assert {(rule.backend, rule.op, rule.mode, rule.device_type) for rule in rules} == {
        (TERMINAL, OPS[0], "eager", "cpu")
    }
    rule = rules[0]
    nbytes = next(each["nbytes"] for each in data["provenance"]["measured"] if each["nbytes"] >= rule.min_nbytes)
    (file,) = (tmp_path / "cache" / "tuned").iterdir()
    assert f"wrote {file}" in err
    assert json.loads(file.read_text()) == data
    arguments = ["explain", "--size", str(nbytes)]
    explained = ranks.run(printed, "comm_core.cli.explain", arguments, installed=True, path=path, env=env)
    assert [status for status, _, _ in explained] == [0, 0], explained
    assert explained[0][1].endswith(f": {TERMINAL} (by the rule {rule})\n")
    assert explained[1][1] == ""
    assert TunedTable.from_json(data).to_json() == data
