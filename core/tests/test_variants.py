"""A backend's variants: choices among them, and a group that follows those of its tuned table."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_core.tuned import TunedTable, describe_group, describe_versions, save_table
from comm_core.tuning import VariantChoice, overlay, parse_rules
from harness import install
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from harness import Ranks


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("sum", "a"), "op='sum' isn't one of"),
        (("all_reduce", ""), "1 to 200 characters, not 0"),
        (("all_reduce", "a" * 201), "1 to 200 characters, not 201"),
        (("all_reduce", 1), "variant=1 isn't a text"),
        (("all_reduce", "a", -1), "min_nbytes=-1 is below 0"),
        (("all_reduce", "a", 2, 1), "max_nbytes=1 is below 2"),
    ],
)
def test_a_choice_has_sense(fields: tuple[Any, ...], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        VariantChoice(*fields)


def test_a_choice_as_text() -> None:
    assert str(VariantChoice("all_reduce", "tree:depth=2", 0, 65536)) == "all_reduce 0-64K: tree:depth=2"
    assert str(VariantChoice("all_reduce", "a", 65537)) == "all_reduce 65537-inf: a"


@dataclasses.dataclass(frozen=True)
class Row:
    up_to_nbytes: int
    name: str


def served(rows: tuple[Row, ...], nbytes: int) -> str:
    return next(row.name for row in rows if nbytes <= row.up_to_nbytes)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True).map(sorted),
    st.lists(st.integers(0, 70), max_size=6, unique=True).map(sorted),
    st.booleans(),
)
def test_a_choice_serves_its_sizes_and_the_table_all_others(ends: list[int], bounds: list[int], is_open: bool) -> None:
    table = tuple(Row(end, f"own {end}") for end in ends)
    pairs = list(zip(bounds[::2], bounds[1::2], strict=False))
    choices = [VariantChoice("all_reduce", f"{low}", low, high) for low, high in pairs]
    if is_open and choices:
        choices[-1] = dataclasses.replace(choices[-1], max_nbytes=None)
    rows = overlay(table, choices, lambda text: Row(0, text))
    assert [row.up_to_nbytes for row in rows] == sorted({row.up_to_nbytes for row in rows})
    assert rows[-1].up_to_nbytes == ends[-1]
    for nbytes in range(1, ends[-1] + 1):
        chosen = [choice.variant for choice in choices if choice.takes(nbytes)]
        assert served(rows, nbytes) == (chosen[0] if chosen else served(table, nbytes))


VARIED = """\
import sys

import comm_core as comm
import torch.distributed as dist

plugin = sys.modules[__name__]
COMM_HOOK_API = (1, 0)

class Session:
    def __init__(self, context):
        self.context = context
        self.log = []

@comm.hookimpl
def is_available(topology):
    return comm.Available(900, (comm.Range("all_reduce", max_nbytes=4096),), numerics="rank_order_fp32")

@comm.hookimpl
def connect(topology, context):
    return Session(context)

@comm.hookimpl
def all_reduce(session, tensor, out):
    session.log.append("all_reduce")
    out = tensor.clone() if out is None else out if out is tensor else out.copy_(tensor)
    dist.all_reduce(out, group=session.context.group)
    return out

@comm.hookimpl
def variants(session, op, nbytes, num_tokens):
    return ["plain", f"{op} of {nbytes} and {num_tokens}"]

@comm.hookimpl
def use_variants(session, choices):
    if any(choice.variant == "unknown" for choice in choices) and session.context.rank == 1:
        raise ValueError("there is no variant 'unknown'")
    session.log.append(choices)
"""
CHOICES = (VariantChoice("all_reduce", "plain", 0, 64), VariantChoice("all_reduce", "other", 100))


def found() -> dict[str, Any]:
    """Get a handle, sum, close it; return what the session heard, and the report."""
    backend = comm.get_backend()
    assert backend.all_reduce(torch.ones(4)).tolist() == [2.0] * 4
    session = backend._serving.sessions.get("varied")
    candidate = backend.decision.candidate("varied")
    heard = [] if session is None else session.value.log
    comm.close()
    return {
        "heard": [item for item in heard if item != "all_reduce"],
        "first": heard[:1],
        "explained": backend.explain(),
        "reason": "" if candidate is None else candidate.reason,
        "rank": None if candidate is None else candidate.rank,
    }


def follow() -> dict[str, Any]:
    """Follow tuned tables of several kinds, and tune by hand."""
    backend = comm.get_backend()
    topology = backend.topology
    offered = backend.variants("all_reduce", 64)
    backend.use_variants({"varied": CHOICES})
    heard = list(backend._serving.sessions["varied"].value.log)
    for name in ("torch_distributed", "gone"):
        with pytest.raises(LookupError, match=f"'{name}' has no variants in group '0'"):
            backend.use_variants({name: ()})
    comm.close()
    results: dict[str, Any] = {"offered": offered, "by hand": heard[-1]}

    def save(rules: str, variants: dict[str, tuple[VariantChoice, ...]]) -> None:
        versions = describe_versions(topology)
        table = TunedTable(describe_group(topology), versions, parse_rules(rules), variants=variants)
        save_table(table, os.environ["COMM_CORE_CACHE_DIR"])
        dist.barrier()

    save("none", {"varied": CHOICES, "gone": CHOICES})
    results["variants"] = found()
    save("torch_distributed:2K-inf:inf", {"varied": CHOICES})
    results["with rules"] = found()
    for variable, value in (("TUNE", "none"), ("TUNE", "varied:0-4K:inf"), ("DETERMINISTIC", "1")):
        os.environ[f"COMM_CORE_{variable}"] = value
        results[value] = found()
        del os.environ[f"COMM_CORE_{variable}"]
    save("none", {"varied": (VariantChoice("all_reduce", "unknown"),)})
    results["unknown"] = found()
    return results


def test_a_group_follows_the_variants_of_its_tuned_table(ranks: Ranks, tmp_path: Path) -> None:
    path = [[install(tmp_path / "site", "varied", VARIED)]] * 2
    env = [{"COMM_CORE_CACHE_DIR": str(tmp_path / f"cache{rank}")} for rank in (0, 1)]
    for results in ranks.run(follow, path=path, env=env):
        assert results["offered"] == {"varied": ("plain", "all_reduce of 64 and 0")}
        assert results["by hand"] == CHOICES
        for name in ("variants", "with rules"):
            # Before the admission test, which makes the first call.
            assert results[name]["heard"] == results[name]["first"] == [CHOICES]
            lines = results[name]["explained"].splitlines()
            at = lines.index("Variants of varied that this table chooses:")
            assert lines[at + 1 : at + 3] == ["  all_reduce 0-64: plain", "  all_reduce 100-inf: other"]
        assert "keeps the backends' own order" in results["variants"]["explained"]
        assert (
            "Variants of gone that this table chooses:  (no effect: the backend is not installed)"
            in (results["variants"]["explained"])
        )
        assert "Rules of the tuned table" in results["with rules"]["explained"]
        for name in ("none", "varied:0-4K:inf", "1"):
            assert results[name]["heard"] == []
            assert results[name]["first"] == ["all_reduce"]
            assert "Variants of" not in results[name]["explained"]
        # One rank's refusal drops the backend on all.
        assert results["unknown"]["heard"] == []
        assert (results["unknown"]["reason"], results["unknown"]["rank"]) == (
            "ValueError: there is no variant 'unknown'",
            1,
        )
        assert "(no effect: the backend is failed)" in results["unknown"]["explained"]
