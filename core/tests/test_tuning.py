"""Rules that override priorities: their text, the plans that follow, and groups of real processes."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import comm_core as comm
import faulty_plugins as faulty
import pytest
import tuning_ranks
from comm_core import cli
from comm_core._plan.decide import Slate
from comm_core._plan.explain import explain, explain_message
from comm_core._plan.routes import Offer, plan_routes
from comm_core.env import Settings, UnreadableSettingError
from comm_core.topology import Host, RankInfo, Topology
from comm_core.tuning import MAX_RULES, RuleError, Tuning, TuningRule, parse_rules, parse_size, short_size
from comm_core.types import DTYPES, MODES, OPS, TERMINAL, Range, Rule
from handle_ranks import outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import DEVICE_TYPES, Message, a_message, generators, offers, serves, takes

if TYPE_CHECKING:
    from harness import Ranks


def a_rule(rng: random.Random, largest: int = 1 << 15) -> TuningRule:
    backend = rng.choice(("a", "b", "c", "d", "e", TERMINAL))
    low = rng.choice((0, 1, rng.randint(0, largest), rng.randint(0, largest)))
    return TuningRule(
        backend,
        rng.choice([1, 50, 400, math.inf] + ([0] if backend != TERMINAL else [])),
        rng.choice((None, rng.choice(OPS))),
        rng.choice((None, rng.choice(MODES))),
        rng.choice((None, rng.choice(DEVICE_TYPES))),
        low,
        rng.choice((None, low, rng.randint(low, 2 * largest), rng.randint(low, 2 * largest))),
    )


@given(generators())
def test_a_rules_text_brings_back_the_rule(rng: random.Random) -> None:
    rules = [a_rule(rng) for _ in range(rng.randint(1, 8))]
    assert parse_rules(",".join(map(str, rules))) == tuple(rules)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shm:inf", [TuningRule("shm", math.inf)]),
        ("none", []),
        (" none ", []),
        (
            "customar_v2:all_reduce:0-4M:graph:80,nccl:4M-inf:inf",
            [
                TuningRule("customar_v2", 80, "all_reduce", "graph", None, 0, 4 << 20),
                TuningRule("nccl", math.inf, min_nbytes=4 << 20),
            ],
        ),
        (
            " shm : cpu : 64k - 1MiB : eager : fused : 7 , ",
            [TuningRule("shm", 7, OPS[1], "eager", "cpu", 65536, 1 << 20)],
        ),
        ("shm:all_reduce_add_rms_norm:0", [TuningRule("shm", 0, OPS[1])]),
    ],
)
def test_conditions_stand_in_any_order_and_the_score_last(text: str, expected: list[TuningRule]) -> None:
    assert parse_rules(text) == tuple(expected)


@pytest.mark.parametrize(
    ("text", "at", "marked", "words"),
    [
        ("shm", 3, 1, "ends without a score"),
        ("shm:", 4, 1, "must end with a score: 0, a number or inf; got ''"),
        ("shm:0-4M", 4, 4, "must end with a score"),
        ("shm:1e3", 4, 3, "must end with a score"),
        ("shm:-1", 4, 2, "must end with a score"),
        ("shm:1234567890", 4, 10, "at most nine digits"),
        ("shm:grahp:3", 4, 5, "did you mean graph?"),
        ("shm:monday:3", 4, 6, "such as all_reduce, graph, cuda or 0-4M"),
        ("shm::3", 4, 1, "'' is no operation"),
        ("shm:1,nccl:eager:graph:3", 17, 5, "'graph' is the rule's second mode"),
        ("shm:1-2:3-4:3", 8, 3, "second range of sizes"),
        ("shm:fused:all_reduce:3", 10, 10, "second operation"),
        ("shm:4M-1K:3", 4, 5, "ends below its start"),
        ("shm:4X-8M:3", 4, 5, "expected bytes, such as 8, 64K or 1M; got '4X'"),
        ("shm:inf-8M:3", 4, 6, "got 'inf'"),
        ("shm:0-9999999999999G:3", 4, 16, "below 2**63"),
        ("shm:80:eager:3", 4, 2, "'80' is a score, and a rule ends with its score"),
        ("shm:1, Shm:2", 7, 3, "expected a backend's name, got 'Shm'"),
        ("shm:1,:2", 6, 1, "expected a backend's name"),
        (f"{TERMINAL}:0", 18, 1, "can't be excluded"),
        (",", 0, 1, "there is no rule"),
        ("none,shm:1", 4, 1, "ends without a score"),
        (",".join(["a:1"] * (MAX_RULES + 1)), 0, 1, f"there are {MAX_RULES + 1} rules"),
    ],
)
def test_an_error_points_at_the_character(text: str, at: int, marked: int, words: str) -> None:
    with pytest.raises(RuleError) as raised:
        parse_rules(text)
    assert str(raised.value).startswith(f"at character {at + 1}, ")
    assert words in str(raised.value)
    shown, mark = raised.value.excerpt
    assert mark.strip() == "^" * marked
    place = len(mark) - marked
    assert shown[place : place + marked].strip() == text[at : at + marked].strip()


@given(st.text(max_size=200) | st.text("anclshm:,-0KM inf", max_size=200))
def test_every_text_is_read_or_marked(text: str) -> None:
    try:
        rules = parse_rules(text)
    except RuleError as error:
        assert str(error).isprintable()  # noqa: PT017 - either outcome is right
        shown, mark = error.excerpt
        assert shown.isprintable()
        assert set(mark) == {" ", "^"}
        assert len(mark) <= len(shown) + 1
        assert len(shown) < 130
    else:
        assert parse_rules(",".join(map(str, rules)) or "none") == rules


@given(st.integers(0, (1 << 63) - 1))
def test_short_sizes_are_exact(nbytes: int) -> None:
    assert parse_size(short_size(nbytes)) == nbytes
    assert short_size(4 << 20) == "4M"


def test_the_variable_names_the_place_in_lines_of_their_own() -> None:
    with pytest.raises(UnreadableSettingError) as raised:
        Settings.read({"COMM_CORE_TUNE": "shm:grahp:3"})
    assert str(raised.value) == (
        "COMM_CORE_TUNE='shm:grahp:3' can't be read: at character 5, 'grahp' is no operation, mode, device type or "
        "range of sizes; did you mean graph?"
    )
    assert raised.value.excerpt == ("  shm:grahp:3", "      ^^^^^")


def test_rules_are_compared_by_their_meaning() -> None:
    one = Settings.read({"COMM_CORE_TUNE": "shm:0-65536:fused:cpu:07"})
    other = Settings.read({"COMM_CORE_TUNE": " shm:cpu:all_reduce_add_rms_norm:0-64K:7,"})
    assert one.shared() == other.shared()
    assert json.loads(json.dumps(one.shared()))["COMM_CORE_TUNE"] == ["shm:fused:0-64K:cpu:7"]
    assert Settings.read({"COMM_CORE_TUNE": "none"}).shared() != Settings().shared()


def score_of(offer: Offer, message: Message, rules: Sequence[TuningRule]) -> float:
    """The score of an offer for a message: the last matching rule's, else the priority."""
    score: float = offer.priority
    for rule in rules:
        if (
            rule.backend == offer.name
            and (rule.op is None or rule.op == message.op)
            and (rule.mode is None or rule.mode == message.mode)
            and (rule.device_type is None or rule.device_type == message.device_type)
            and rule.min_nbytes <= message.nbytes
            and (rule.max_nbytes is None or message.nbytes <= rule.max_nbytes)
        ):
            score = rule.score
    return score


def served_by(made: Sequence[Offer], message: Message, rules: Sequence[TuningRule]) -> str:
    """The backend with the highest score among those whose ranges take the message; the first of equal ones."""
    everyone = [*made, Offer(TERMINAL, 0, tuple(map(Range, OPS)))]
    able = [o for o in everyone if any(takes(item, message) and not item.prepared for item in o.ranges)]
    best = max(score_of(offer, message, rules) for offer in able)
    return next(o.name for o in able if score_of(o, message, rules) == best) if best > 0 else TERMINAL


@settings(deadline=None, max_examples=400)
@given(offers(), generators())
def test_the_highest_score_serves_within_its_own_ranges(made: tuple[Offer, ...], rng: random.Random) -> None:
    rules = [a_rule(rng) for _ in range(rng.randint(0, 6))]
    routes = {(r.op, r.mode, r.device_type, r.dtype): r for r in plan_routes(made, DEVICE_TYPES, rules)}
    edges = [Range(rule.op or OPS[0], min_nbytes=rule.min_nbytes, max_nbytes=rule.max_nbytes) for rule in rules]
    for _ in range(8):
        m = a_message(rng, [*(item for offer in made for item in offer.ranges), *edges])
        route = routes[m.op, m.mode, m.device_type, m.dtype]
        found = next(rule for rule in route.rules if rule.takes(m.nbytes, m.num_tokens, m.hidden_size))
        assert found.backend == served_by(made, m, rules), (rules, m)
        assert not found.tuned or any(str(rule) == found.tuned for rule in rules if rule.backend == found.backend)
        assert route.rules[-1] == Rule(TERMINAL)


@given(offers(), generators())
def test_without_rules_nothing_changes(made: tuple[Offer, ...], rng: random.Random) -> None:
    m = a_message(rng, [item for offer in made for item in offer.ranges])
    assert served_by(made, m, ()) == serves(made, m)
    assert plan_routes(made, DEVICE_TYPES, ()) == plan_routes(made, DEVICE_TYPES)


FAST = Offer("fast", 300, (Range("all_reduce", max_nbytes=1 << 20), Range(OPS[1], max_tokens=8)), "1.0")
PLAIN = Offer("plain", 100, (Range("all_reduce"),), "2.0")
TOPOLOGY = Topology.of([RankInfo(rank, Host("one", "1")) for rank in range(2)])


def tuned(text: str) -> Slate:
    return Slate((FAST, PLAIN), (), Tuning(parse_rules(text), "COMM_CORE_TUNE"))


def test_explain_says_which_rule_decided() -> None:
    decision = tuned(f"plain:64K-inf:inf,fast:fused:0,gone:5,{TERMINAL}:0-1K:400").decision(("cpu",))
    words = [" ".join(line.split()) for line in explain("g", TOPOLOGY, decision).splitlines()]
    assert (
        "all_reduce eager cpu all plain from 64 KiB [1]; torch_distributed up to 1 KiB [4]; fast up to 1 MiB; "
        "torch_distributed any size"
    ) in words
    assert words[-5:] == [
        "Rules of COMM_CORE_TUNE that override priorities:",
        "[1] plain:64K-inf:inf",
        "[2] fast:fused:0",
        "[3] gone:5 (no effect: the backend is not installed)",
        "[4] torch_distributed:0-1K:400",
    ]
    route = decision.route("all_reduce", "eager", "cpu", "float32")
    assert explain_message(decision, route, 1 << 20).endswith(": plain (by the rule plain:64K-inf:inf)")
    assert explain_message(decision, route, 4096).endswith(": fast")
    fused = decision.route(OPS[1], "eager", "cpu", "float32")
    assert explain_message(decision, fused, 1 << 20).endswith(
        ": core's norm after an all_reduce by plain (by the rule plain:64K-inf:inf)"
    )
    json.dumps(decision.to_json(), allow_nan=False)


def test_who_is_excluded_stands_by_with_that_reason() -> None:
    decision = tuned("fast:0").decision(("cpu",))
    found = {item.name: (item.verdict, item.reason) for item in decision.candidates}
    assert found["fast"] == ("standby", "tuning rules exclude it, or backends earlier in the order serve its ranges")
    assert found["plain"][0] == "serves"


def test_rules_outlive_a_dropped_backend_and_new_ranges() -> None:
    slate = tuned("plain:0-4K:inf").without("fast", "no compiler")
    assert slate.with_ranges("plain", (Range("all_reduce", max_nbytes=8),)).tuning == slate.tuning
    cells = {("all_reduce", "eager", "cpu", dtype): ("wrong", 0) for dtype in DTYPES if dtype != "int8"}
    assert slate.without_cells("plain", cells, ("cpu",)).tuning == slate.tuning
    (route,) = (r for r in slate.routes(("cpu",)) if (r.op, r.dtype) == ("all_reduce", "int8"))
    assert route.rules[0].tuned == "plain:0-4K:inf"


# The largest message of the backends of these tests, in elements.
LARGEST = faulty.MAX_NBYTES // 4


@pytest.fixture
def path(tmp_path: Path) -> list[list[Path]]:
    """The backends `first` and, after it, `second`, on two ranks."""
    second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
    return [[faulty.install_kind(tmp_path / "first", faulty.Good, "first", 300), second]] * 2


@pytest.mark.parametrize(
    ("rules", "served"),
    [
        ("", {1: "first", LARGEST: "first", LARGEST + 1: TERMINAL}),
        ("none", {1: "first", LARGEST: "first", LARGEST + 1: TERMINAL}),
        ("second:inf", {1: "second", LARGEST: "second", LARGEST + 1: TERMINAL}),
        ("second:250", {1: "first"}),
        ("second:301", {1: "second"}),
        ("first:0", {1: "second", LARGEST: "second"}),
        ("first:0,second:0", {1: TERMINAL, LARGEST: TERMINAL}),
        ("second:0-64:inf", {1: "second", 16: "second", 17: "first"}),
        (f"second:all_reduce:33-inf:cpu:eager:inf,{TERMINAL}:128-128:inf", {8: "first", 9: "second", 32: "second"}),
        (f"{TERMINAL}:128-inf:350", {1: "first", 31: "first", 32: TERMINAL, LARGEST: TERMINAL}),
        ("second:graph:inf,second:cuda:inf,second:fused:inf", {1: "first", LARGEST: "first"}),
    ],
)
def test_a_rule_decides_in_a_group_of_processes(
    ranks: Ranks, path: list[list[Path]], rules: str, served: dict[int, str]
) -> None:
    found = ranks.run(tuning_ranks.serve, tuple(served), path=path, env={"COMM_CORE_TUNE": rules})
    for each in found:
        assert each["served"] == served
        assert each["right"]
        assert each["decision"] == found[0]["decision"]
        assert ("Rules of COMM_CORE_TUNE" in each["explained"]) == (rules not in {"", "none"})


def test_a_rule_decides_among_named_backends_too(ranks: Ranks, path: list[list[Path]]) -> None:
    env = {"COMM_CORE_TUNE": "second:0-64:inf"}
    for each in ranks.run(tuning_ranks.serve, (1, 17), ("first", "second"), path=path, env=env):
        assert each["served"] == {1: "second", 17: "first"}


def get() -> tuple[str, str]:
    return outcome(comm.get_backend)


def test_ranks_with_different_rules_raise(ranks: Ranks, path: list[list[Path]]) -> None:
    env = [{"COMM_CORE_TUNE": "second:inf"}, {"COMM_CORE_TUNE": "second:0-64:inf"}]
    values = "{1: ['second:0-64:inf'], others: ['second:inf']}"
    for kind, text in ranks.run(get, path=path, env=env):
        assert kind == "NegotiationError"
        assert f"COMM_CORE_TUNE differs between the ranks of this group: {values}" in text


def test_an_unreadable_rule_raises_on_all_ranks_and_shows_the_place(ranks: Ranks, path: list[list[Path]]) -> None:
    for kind, text in ranks.run(get, path=path, env=[{}, {"COMM_CORE_TUNE": "second:grahp:inf"}]):
        assert kind == "NegotiationError"
        assert "rank 1: COMM_CORE_TUNE='second:grahp:inf' can't be read: at character 8, 'grahp'" in text
        assert text.splitlines()[-2:] == ["  second:grahp:inf", "         ^^^^^"]


def warnings_of_a_group() -> list[str]:
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("comm_core").addHandler(handler)
    for _ in range(2):
        comm.get_backend()
        comm.close()
    logging.getLogger("comm_core").removeHandler(handler)
    return texts


def test_a_rule_of_a_backend_that_is_not_installed_warns_once_on_one_rank(ranks: Ranks, path: list[list[Path]]) -> None:
    env = {"COMM_CORE_TUNE": "secnd:0-64:inf,secnd:0"}
    first, second = ranks.run(warnings_of_a_group, path=path, env=env)
    assert first == ["COMM_CORE_TUNE names 'secnd', which isn't installed here"]
    assert second == []


def test_the_command_shows_the_place_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMM_CORE_TUNE", "shm:0-4M:eager:fats:inf")
    assert cli.main(["demo"]) == 2
    error = capfd.readouterr().err.splitlines()
    assert error[-2:] == ["  shm:0-4M:eager:fats:inf", "                 ^^^^"]
