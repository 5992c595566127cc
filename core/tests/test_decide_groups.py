"""Decisions of a thousand made-up groups: the same from every rank's copy of the evidence, and the best on offer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from comm_core._plan.checks import check_policies
from comm_core._plan.decide import Evidence, encode_answer, initial_slate, screen_candidates
from comm_core._plan.routes import cells
from comm_core.topology import Device, Host, RankInfo
from comm_core.types import DTYPES, OPS, TERMINAL, Available, Decision, Range, Unavailable
from made_up import DEVICE_TYPES, Message, backwards, takes


def a_range(rng: random.Random) -> Range:
    low = rng.choice((0, 1, 4096, rng.randrange(1 << 20)))
    return Range(
        rng.choice(OPS),
        modes=rng.choice((None, ("eager",), ("graph",))),
        dtypes=rng.choice((None, ("bfloat16", "float16"), tuple(rng.sample(list(DTYPES), 3)))),
        device_types=rng.choice((None, ("cuda",), ("cpu",))),
        min_nbytes=low,
        max_nbytes=rng.choice((None, low + rng.randrange(1 << 20))),
        multiple_nbytes=rng.choice((1, 8, 16)),
    )


def an_answer(rng: random.Random) -> Available | Unavailable:
    if rng.random() < 0.1:
        return Unavailable(rng.choice(("two hosts", "no compiler")))
    made = tuple(a_range(rng) for _ in range(rng.randint(1, 3)))
    return Available(rng.choice((100, 200, 300, 500)), made)


def a_group(rng: random.Random) -> tuple[list[Evidence], list[dict[str, Available | Unavailable]]]:
    """A group of one to eight ranks, most of which know the same of the same plugins."""
    names = rng.sample(("customar_v1", "customar_v2", "flashinfer_fusion", "nccl", "shm", "theirs"), rng.randint(0, 6))
    world_size = rng.randint(1, 8)
    common = {name: an_answer(rng) for name in names}
    found, answers = [], []
    for rank in range(world_size):
        mine = {name: "0.9" if rng.random() < 0.03 else "1.0" for name in names if rng.random() > 0.03}
        failures = {name: "its import raised" for name in names if rng.random() < 0.03}
        device = rng.choice((None, Device("cuda", f"GPU-{rank}")))
        found.append(
            Evidence(RankInfo(rank, Host("node", f"id {rng.randint(0, 1)}"), device, plugins=mine), {}, failures)
        )
        answers.append({name: an_answer(rng) if rng.random() < 0.1 else common[name] for name in names})
    return found, answers


def encoded(answers: Sequence[Mapping[str, Available | Unavailable]]) -> list[dict[str, Any]]:
    return [{name: encode_answer(answer) for name, answer in item.items()} for item in answers]


def decide(found: Sequence[Evidence], answers: Sequence[Mapping[str, Any]]) -> Decision:
    check_policies(found, str)
    asked, dropped = screen_candidates(found, None, (), "")
    return initial_slate(asked, answers, dropped).decision(DEVICE_TYPES)


def test_a_thousand_groups_decide_from_the_evidence_alone() -> None:
    """As each rank would: from its own copy, which came as JSON, in whatever order its plugins were found."""
    verdicts: set[str] = set()
    for seed in range(1000):
        found, answers = a_group(random.Random(seed))  # noqa: S311 - no secret
        decision = decide(found, encoded(answers))
        copies = [Evidence.from_json(json.loads(json.dumps(item.to_json()))) for item in found]
        turned = [
            Evidence(
                RankInfo(c.info.global_rank, c.info.host, c.info.device, plugins=backwards(c.info.plugins)),
                {},
                backwards(c.failures),
            )
            for c in copies
        ]
        theirs = json.loads(json.dumps([backwards(answer) for answer in encoded(answers)]))
        assert decide(turned, theirs) == decision, f"seed {seed}"
        verdicts.update(candidate.verdict for candidate in decision.candidates)
    assert verdicts == {"serves", "standby", "unavailable"}


def test_who_serves_does_not_depend_on_the_order_of_the_ranks() -> None:
    for seed in range(300):
        rng = random.Random(seed)  # noqa: S311 - no secret
        found, answers = a_group(rng)
        order = rng.sample(range(len(found)), len(found))
        decision = decide(found, encoded(answers))
        turned = decide([found[rank] for rank in order], encoded([answers[rank] for rank in order]))
        assert [(c.name, c.priority) for c in turned.candidates] == [(c.name, c.priority) for c in decision.candidates]
        for one, other in zip(decision.routes, turned.routes, strict=True):
            numel = rng.choice((1, 1024, rng.randrange(1, 1 << 20)))
            message = (numel * DTYPES[one.dtype], 1, numel)
            assert one.backend_for(*message) == other.backend_for(*message), f"seed {seed}"


def test_a_thousand_groups_send_each_message_to_the_best_that_every_rank_offers() -> None:
    """The oracle knows priorities, names and ranges, and nothing of merging, rules or routes."""
    checked = 0
    for seed in range(1000):
        rng = random.Random(seed)  # noqa: S311 - no secret
        found, answers = a_group(rng)
        decision = decide(found, encoded(answers))
        asked, _ = screen_candidates(found, None, (), "")
        willing: dict[str, list[Available]] = {}
        for name in asked:
            yeses = [yes for answer in answers if isinstance(yes := answer[name], Available)]
            if len(yeses) == len(answers):
                willing[name] = yeses
        ordered = sorted(willing, key=lambda name: (-min(answer.priority for answer in willing[name]), name))
        for op, mode, device_type, dtype in rng.sample(cells(DEVICE_TYPES), 5):
            numel = rng.choice((1, 1024, rng.randrange(1, 1 << 20)))
            message = Message(op, mode, device_type, dtype, numel * DTYPES[dtype], 1, numel)
            takers = [
                name
                for name in ordered
                if all(any(takes(item, message) for item in answer.ranges) for answer in willing[name])
            ]
            route = decision.route(op, mode, device_type, dtype)
            assert route.backend_for(message.nbytes, 1, numel) == (takers or [TERMINAL])[0], f"seed {seed}, {message}"
            checked += bool(takers)
    assert checked > 300
