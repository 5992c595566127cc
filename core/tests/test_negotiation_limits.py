"""What plugins, variables or another release on one rank say can't end or confuse the negotiation of the others."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import faulty_plugins as faulty
import oversized_plugins as oversized
import pytest
import torch
import torch.distributed as dist
from comm_core._plan.decide import Evidence
from harness import install

if TYPE_CHECKING:
    from collections.abc import Mapping

    from harness import Ranks


@dataclasses.dataclass
class Outcome:
    """What one rank saw: the decision, or the error; and every text that reaches a user."""

    error: str = ""
    words: str = ""
    decision: Any = None
    texts: list[str] = dataclasses.field(default_factory=list)


def negotiate(prepares: bool = False, **options: Any) -> Outcome:
    """Get a backend and sum by it; runs in every rank of the job."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("comm_core").addHandler(handler)
    try:
        backend = comm.get_backend(**options)
        if prepares:
            comm.pre_capture_init(max_tokens=4, hidden_size=8, dtype=torch.float32)
        assert torch.equal(backend.all_reduce(torch.ones(8)), torch.full((8,), float(dist.get_world_size())))
        return Outcome(decision=backend.decision.to_json(), texts=[*records, *backend.explain().split("\n")])
    except comm.CommError as error:
        return Outcome(type(error).__name__, str(error), texts=[*records, str(error)])
    finally:
        logging.getLogger("comm_core").removeHandler(handler)
        comm.close()


def run(ranks: Ranks, path: list[list[Path]], *arguments: Any, env: Any = None) -> list[Outcome]:
    """The outcomes of all ranks, which agree; nothing that a user reads has control characters."""
    outcomes: list[Outcome] = ranks.run(negotiate, *arguments, world_size=len(path), path=path, env=env)
    for outcome in outcomes:
        assert (outcome.error, outcome.words, outcome.decision) == (
            outcomes[0].error,
            outcomes[0].words,
            outcomes[0].decision,
        )
        assert all(text.isprintable() for text in outcome.texts), outcome.texts
    return outcomes


def candidates(outcome: Outcome) -> Mapping[str, dict[str, Any]]:
    return {item["name"]: item for item in outcome.decision["candidates"]}


@pytest.mark.parametrize(
    ("kind", "verdict", "reason"),
    [
        (oversized.AsksForManyRanges, "unavailable", "is_available returned 2000 ranges; the limit is 64"),
        (oversized.AsksForAHugePriority, "unavailable", "priority is above 9223372036854775807"),
        (oversized.AsksWithAnObject, "unavailable", "isn't True or False"),
        (oversized.AsksWithALongDeviceType, "unavailable", "names of at most 64 characters"),
        (oversized.SaysNoWithEscapes, "unavailable", "no?[2J? link rank 7: forged"),
        (oversized.ConnectRaisesEscapes, "failed", "OSError: no?[2J? link forged"),
        (oversized.ConnectTimesOutWithEscapes, "failed", "no?[2J? link forged"),
        (oversized.ConnectVotesWithEscapes, "failed", "OSError: no?[2J? link forged"),
        (oversized.ProbeIsDeep, "unavailable", "nested more than 16 levels deep"),
        (oversized.ProbeRepeatsAName, "unavailable", "with each name once"),
        (oversized.PreparesManyRanges, "failed", "pre_capture_init returned 2000 ranges; the limit is 64"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_a_backend_that_says_too_much_is_dropped_alone(
    ranks: Ranks, tmp_path: Path, kind: type[faulty.Good], verdict: str, reason: str
) -> None:
    first = faulty.install_kind(tmp_path / "first", kind, "first", 300, on=[1])
    second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
    for outcome in run(ranks, [[first, second]] * 2, kind is oversized.PreparesManyRanges):
        assert outcome.error == "", outcome.words
        found = candidates(outcome)
        assert (found["first"]["verdict"], found["first"]["version"]) == (verdict, "1.0")
        assert reason in found["first"]["reason"]
        assert len(found["first"]["reason"]) < 1100
        assert found["second"]["verdict"] == "serves"


def test_a_failure_of_several_lines_is_logged_where_it_happened(ranks: Ranks, tmp_path: Path) -> None:
    first = faulty.install_kind(tmp_path / "first", oversized.ConnectRaisesEscapes, "first", 300, on=[1])
    there, here = run(ranks, [[first]] * 2)
    assert [line for line in here.texts if line.startswith("comm_core: OSError: ")][1:] == [
        "comm_core: OSError: forged"
    ]
    assert not any("comm_core: OSError" in line for line in there.texts)


def test_many_broken_and_many_sound_backends(ranks: Ranks, tmp_path: Path) -> None:
    second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
    broken = "raise ImportError('\\U0001f480 no library' * 900)"
    bad = [install(tmp_path / f"bad{number}", f"bad{number}", broken) for number in range(60)]
    wide = [
        faulty.install_kind(tmp_path / f"wide{number}", oversized.ProbeTakesItsWholeRoom, f"wide{number}", 100)
        for number in range(40)
    ]
    for outcome in run(ranks, [[second, *bad, *wide]] * 2):
        assert outcome.error == "", outcome.words
        found = candidates(outcome)
        assert found["second"]["verdict"] == "serves"
        for number in range(60):
            assert found[f"bad{number}"]["verdict"] == "unavailable"
            assert "its import raised ImportError: \U0001f480 no" in found[f"bad{number}"]["reason"]
        assert {found[f"wide{number}"]["verdict"] for number in range(40)} == {"standby"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"COMM_CORE_BACKENDS": "a" * 100_000}, "COMM_CORE_BACKENDS='aaa"),
        ({"COMM_CORE_DISABLE": "a," * 50_000}, "COMM_CORE_DISABLE='a,a"),
        ({"COMM_CORE_DISABLE": "\x1b[2J"}, "characters that can't be printed"),
        ({"COMM_CORE_WAIT_TIMEOUT_S": "1e300"}, "at most 2592000 seconds"),
        ({"COMM_CORE_WAIT_TIMEOUT_S": "9" * 100_000}, "it has 100000 bytes; the limit is 2048"),
        ({"COMM_CORE_MEMORY_BUDGET_NBYTES": "9" * 1000}, "below 2**63"),
        ({"COMM_CORE_DEBUG": "perhaps"}, "expected 1, true or yes"),
        ({"COMM_CORE_DEBUG": "1"}, "COMM_CORE_DEBUG differs between the ranks of this group: {1: True, others: False}"),
        ({"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, "COMM_CORE_DEBUG differs between the ranks"),
    ],
    ids=lambda item: str(item)[:50],
)
def test_a_variable_of_one_rank_is_named_on_all(ranks: Ranks, env: dict[str, str], words: str) -> None:
    for outcome in run(ranks, [[], []], env=[{}, env]):
        assert outcome.error == "NegotiationError"
        assert words in outcome.words
        assert len(outcome.words) < 1000


def test_spellings_of_one_meaning_are_equal(ranks: Ranks, tmp_path: Path) -> None:
    second = faulty.install_kind(tmp_path, faulty.Good, "second", 200)
    env = [
        {"COMM_CORE_DISABLE": "nccl,shm", "COMM_CORE_WAIT_TIMEOUT_S": "300", "COMM_CORE_DEBUG": "0"},
        {"COMM_CORE_DISABLE": " shm, nccl ,shm", "COMM_CORE_WAIT_TIMEOUT_S": "3e2", "COMM_CORE_DEBUG": "no"},
    ]
    for names in ({}, {"COMM_CORE_BACKENDS": "third,second"}):
        turned = {name: ",".join(reversed(value.split(","))) for name, value in names.items()}
        for outcome in run(ranks, [[second]] * 2, env=[env[0] | names, env[1] | turned]):
            assert outcome.error == "", outcome.words
            assert candidates(outcome)["second"]["verdict"] == "serves"


def name_backends(orders: list[tuple[str, ...]]) -> Outcome:
    """Name backends in an order of this rank's own; runs in every rank of the job."""
    return negotiate(backends=orders[dist.get_rank()])


def test_named_backends_may_come_in_any_order(ranks: Ranks, tmp_path: Path) -> None:
    folders = [
        faulty.install_kind(tmp_path / name, faulty.Good, name, priority) for name, priority in (("a", 300), ("b", 200))
    ]
    for outcome in ranks.run(name_backends, [("a", "b"), ("b", "a")], path=[folders] * 2):
        assert outcome.error == "", outcome.words
        assert candidates(outcome)["a"]["verdict"] == "serves"
    for outcome in ranks.run(name_backends, [("a",), ("a" * 100_000,)], path=[folders] * 2):
        assert outcome.error == "NegotiationError"
        assert "the names have 100000 bytes; the limit is 2048" in outcome.words


def as_another_release(rank: int, version: str, changes: dict[str, Any], missing: tuple[str, ...]) -> Outcome:
    """Negotiate while one rank sends what another release of comm-core would; runs in every rank of the job."""
    original = Evidence.to_json

    def to_json(evidence: Evidence) -> dict[str, Any]:
        sent = original(evidence)
        sent["comm_core"] = sent["info"]["versions"]["comm_core"] = version
        sent["info"] |= changes
        for name in missing:
            del sent["info"][name]
        return sent

    if dist.get_rank() == rank:
        Evidence.to_json = to_json  # type: ignore[method-assign]
    try:
        return negotiate()
    finally:
        Evidence.to_json = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, ()),
        ({"numa": 1, "racks": {"a": [1]}}, ()),
        ({}, ("host",)),
        ({"host": 5, "plugins": ["shm"]}, ("unknown",)),
    ],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_another_release_of_core_is_named_on_all_ranks(
    ranks: Ranks, rank: int, changes: dict[str, Any], missing: tuple[str, ...]
) -> None:
    for outcome in ranks.run(as_another_release, rank, "0.1.1", {"unknown": {}} | changes, missing, world_size=3):
        assert outcome.error == "NegotiationError"
        assert f"comm-core differs between the ranks: {{{rank}: '0.1.1', others: " in outcome.words
        assert "Install the same release on every rank" in outcome.words


def test_an_unknown_fact_of_the_same_release_is_ignored(ranks: Ranks) -> None:
    for outcome in ranks.run(as_another_release, 1, comm.__version__, {"numa": 1}, ()):
        assert outcome.error == "", outcome.words
