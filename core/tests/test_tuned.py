"""Tuned tables: their files, when they hold, and that ranks follow one only if all have it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comm_core as comm
import faulty_plugins as faulty
import pytest
import torch.distributed as dist
import tuning_ranks
from comm_core._group.ask import agree_on_table
from comm_core._topologies import load_topologies
from comm_core.topology import Device, Host, Link, RankInfo, Topology
from comm_core.tuned import TunedTable, describe_group, describe_versions, find_table, save_table
from comm_core.tuning import NO_TUNING, VariantChoice, parse_rules

if TYPE_CHECKING:
    from harness import Ranks

VERSIONS = {"comm_core": "0.1.0", "torch": "2.13.0", "python": "3.12.1"}


def cpus(name: str = "node", plugins: dict[str, str] | None = None, versions: dict[str, str] = VERSIONS) -> Topology:
    ranks = (RankInfo(rank, Host(name, "an id"), versions=versions, plugins=plugins or {"shm": "1"}) for rank in (0, 1))
    return Topology.of(ranks)


def gpus(*, nvlinks: int = 18, name: str = "NVIDIA H200", uuid: str = "GPU", swap: bool = False) -> Topology:
    links = {f"{uuid}-{rank}": Link(nvlinks, p2p=True) for rank in range(4)}
    if swap:
        links[f"{uuid}-3"] = Link(0, p2p=True)
    ranks = (
        RankInfo(
            rank, Host("any", "id"), Device("cuda", f"{uuid}-{rank}", name, (9, 0), links=links), versions=VERSIONS
        )
        for rank in range(4)
    )
    return Topology.of(ranks, ("cuda", "cpu"))


VARIANTS = {"shm": (VariantChoice("all_reduce", "loop", 1, 512), VariantChoice("all_reduce", "tree:depth=2", 513))}


def table(
    topology: Topology, rules: str = "shm:0-4K:0", variants: Mapping[str, tuple[VariantChoice, ...]] = VARIANTS
) -> TunedTable:
    return TunedTable(
        describe_group(topology),
        describe_versions(topology),
        parse_rules(rules),
        {"command": ["comm-core", "tune"]},
        variants,
    )


def with_variant(*choices: dict[str, Any]) -> str:
    return json.dumps({"schema": 2, "group": {}, "versions": {}, "rules": [], "variants": {"shm": choices}})


def choice(low: int, high: int | None, op: str = "all_reduce") -> dict[str, Any]:
    return {"op": op, "variant": "a", "min_nbytes": low, "max_nbytes": high}


def test_json_brings_back_the_table() -> None:
    for rules in ("none", "shm:all_reduce:0-96K:eager:cpu:inf,nccl:fused:12345-inf:7"):
        made = table(cpus(), rules)
        assert TunedTable.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_every_kind_of_group_has_a_description_of_its_own() -> None:
    known = dict(load_topologies())
    # One host of two, as a group that is alone there.
    assert describe_group(known.pop("one-of-two-dgx-h100")) == describe_group(known["dgx-h100"])
    described = {json.dumps(describe_group(topology)) for topology in known.values()}
    assert len(described) == len(known) > 10
    assert max(map(len, described)) < 50_000


def test_devices_and_links_make_the_kind_of_group_not_which_ones() -> None:
    kinds = [gpus(), gpus(nvlinks=4), gpus(nvlinks=0), gpus(name="NVIDIA H100"), gpus(swap=True)]
    described = [describe_group(topology) for topology in kinds]
    assert all(one not in described[:number] for number, one in enumerate(described))
    assert describe_group(gpus(uuid="MIG")) == described[0]
    assert described[0]["links"] == ["NV18"]
    assert described[-1]["links"][0] == "NV18 NV18 P2P"
    # A topology doesn't have the model of a CPU, so the host's name stands for it.
    assert describe_group(cpus("one")) != describe_group(cpus("other"))


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        (cpus(), ""),
        (cpus(versions=VERSIONS | {"python": "3.14.0"}), ""),
        (cpus(versions=VERSIONS | {"torch": "2.14.0"}), "other versions (torch 2.13.0 then, 2.14.0 now)"),
        (cpus(plugins={"shm": "2"}), "other versions (backend shm 1 then, 2 now)"),
        (cpus(plugins={"shm": "1", "new": "3"}), "other versions (backend new none then, 3 now)"),
        (cpus("elsewhere"), "another kind of group"),
        (gpus(), "another kind of group"),
    ],
)
def test_a_table_holds_for_its_kind_of_group_and_its_versions(topology: Topology, words: str) -> None:
    found = table(cpus()).misfit(topology)
    assert found.endswith(words) if words == "" else words in found
    assert (found == "") == (words == "")


def test_a_table_is_found_again_by_its_user_alone(tmp_path: Path) -> None:
    made = table(cpus())
    path = save_table(made, str(tmp_path / "cache"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert find_table(cpus(), str(tmp_path / "cache")) == made
    changed = dataclasses.replace(made, rules=())
    assert save_table(changed, str(tmp_path / "cache")) == path
    assert find_table(cpus(), str(tmp_path / "cache")) == changed
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert find_table(gpus(), str(tmp_path / "cache")) is None


def test_looking_for_a_table_makes_no_folder(tmp_path: Path) -> None:
    assert find_table(cpus(), str(tmp_path / "cache")) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "isn't JSON"),
        ("[]", "has schema none"),
        ('{"schema": 1}', "has schema 1; this release reads 2"),
        ('{"schema": 2}', "lacks group, rules, versions"),
        ('{"schema": 2, "group": {}, "versions": {}, "rules": "shm:0"}', "rules is a text instead of a list"),
        ('{"schema": 2, "group": {}, "versions": {}, "rules": ["shm:grahp:0"]}', "did you mean graph?"),
        (with_variant({"op": "sum", "variant": "a"}), "op='sum' isn't one of"),
        (with_variant({"op": "all_reduce"}), "lacks variant"),
        (with_variant({"op": "all_reduce", "variant": "a", "min_nbytes": 2, "max_nbytes": 1}), "max_nbytes=1 is below"),
        (with_variant({"op": "all_reduce", "variant": "a" * 201}), "1 to 200 characters"),
        (with_variant(choice(0, 64), choice(64, 65)), "the sizes of all_reduce overlap or don't ascend"),
        (with_variant(choice(65, None), choice(0, 64)), "overlap or don't ascend"),
        (
            with_variant(choice(0, None), choice(7, 9, "all_reduce_add_rms_norm"), choice(9, 9)),
            "overlap or don't ascend",
        ),
        ("[" * 5000, "levels deep"),
        ("x" * (5 << 20), "more than 4194304 bytes"),
        ("\udcff", "can't be used"),
    ],
)
def test_a_damaged_file_is_a_reason(tmp_path: Path, text: str, words: str) -> None:
    path = save_table(table(cpus()), str(tmp_path))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match="can't be used: ") as raised:
        find_table(cpus(), str(tmp_path))
    assert words in str(raised.value)


@pytest.mark.parametrize("what", ["the file", "the folder", "a link"])
def test_a_file_that_others_could_have_written_is_not_read(tmp_path: Path, what: str) -> None:
    path = save_table(table(cpus()), str(tmp_path))
    if what == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.chmod(path if what == "the file" else path.parent, 0o777)  # noqa: PTH101, S103 - the test's point
    with pytest.raises(ValueError, match=r"others can write|isn't a regular file"):
        find_table(cpus(), str(tmp_path))


def label(*ranks: int) -> str:
    return f"rank {', '.join(map(str, ranks))}"


def test_ranks_follow_a_table_only_if_all_have_it() -> None:
    made, other, empty = table(cpus()), table(cpus(), "shm:0"), table(cpus(), "none", {})
    mine = (made.digest, "")
    assert agree_on_table(made, [mine, mine], label).rules == made.rules
    assert agree_on_table(made, [mine, mine], label).variants == VARIANTS
    assert agree_on_table(made, [mine, mine], label).source == f"the tuned table {made.digest[:8]}"
    assert agree_on_table(None, [("", "")] * 2, label) == NO_TUNING
    none = agree_on_table(empty, [(empty.digest, "")] * 2, label)
    assert (none.rules, none.source) == ((), f"the tuned table {empty.digest[:8]} keeps the backends' own order")
    for votes, words in (
        ([mine, ("", "")], "rank 1 has none. Run comm-core tune on all hosts"),
        ([mine, (other.digest, "")], "the ranks' tables differ"),
        ([mine, ("", "it was measured elsewhere")], "rank 1: it was measured elsewhere. Run comm-core tune again"),
    ):
        for own in (made, None):
            found = agree_on_table(own, votes, label)
            assert found.rules == ()
            assert found.variants == {}
            assert words in found.source
    assert len({made.digest, other.digest, table(cpus(), variants={}).digest}) == 3
    assert dataclasses.replace(made, provenance={}).digest == made.digest


def save_and_serve(
    rules: tuple[str, str], versions: dict[str, str], named: tuple[str, ...] | None, numels: tuple[int, ...]
) -> dict[str, Any]:
    """Write each rank's table into its own cache, and sum; returns what `serve` returns."""
    topology = comm.get_backend().topology
    comm.close()
    text = rules[dist.get_rank()]
    if text:
        made = table(topology, text, variants={})
        made = dataclasses.replace(made, versions={**made.versions, **versions})
        save_table(made, os.environ["COMM_CORE_CACHE_DIR"])
    dist.barrier()
    return tuning_ranks.serve(numels, named)


RULE = "second:all_reduce:0-64:eager:cpu:inf"


@pytest.mark.parametrize(
    ("rules", "versions", "tune", "named", "served", "words"),
    [
        ((RULE, RULE), {}, "", None, "second", "Rules of the tuned table "),
        ((RULE, RULE), {"torch": "1.0"}, "", None, "first", "isn't used: rank 0: it was measured with other versions"),
        ((RULE, ""), {}, "", None, "first", "isn't used: rank 1 has none"),
        ((RULE, "second:0-32:inf"), {}, "", None, "first", "isn't used: the ranks' tables differ: {"),
        ((RULE, RULE), {}, "none", None, "first", ""),
        (("first:0", "first:0"), {}, "second:0-64:400", None, "second", "Rules of COMM_CORE_TUNE "),
        ((RULE, RULE), {}, "", ("first", "second"), "first", ""),
        (("none", "none"), {}, "", None, "first", "keeps the backends' own order"),
    ],
)
def test_a_group_of_processes(
    ranks: Ranks,
    tmp_path: Path,
    rules: tuple[str, str],
    versions: dict[str, str],
    tune: str,
    named: tuple[str, ...] | None,
    served: str,
    words: str,
) -> None:
    second = faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)
    path = [[faulty.install_kind(tmp_path / "first", faulty.Good, "first", 300), second]] * 2
    env = [{"COMM_CORE_CACHE_DIR": str(tmp_path / f"cache{rank}"), "COMM_CORE_TUNE": tune} for rank in (0, 1)]
    found = ranks.run(save_and_serve, rules, versions, named, (16, 17), path=path, env=env)
    for each in found:
        assert each["served"] == {16: served, 17: "first"}
        assert each["right"]
        assert each["decision"] == found[0]["decision"]
        assert words in each["explained"]
        if not words:
            assert "tuned" not in each["explained"].lower()


def test_a_deterministic_group_follows_no_table(ranks: Ranks, tmp_path: Path) -> None:
    path = [[faulty.install_kind(tmp_path / "second", faulty.Good, "second", 200)]] * 2
    env = {"COMM_CORE_CACHE_DIR": str(tmp_path / "cache"), "COMM_CORE_DETERMINISTIC": "1"}
    rules = "second:inf", "second:inf"
    for each in ranks.run(save_and_serve, rules, {}, None, (16,), path=path, env=env):
        assert each["right"]
        assert "tuned" not in each["explained"].lower()
