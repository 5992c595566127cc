from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from comm_core._schema import printable
from comm_core._topologies import describe_topologies, load_topologies
from comm_core.topology import SCHEMA, Device, Host, Link, RankInfo, Topology
from hypothesis import given
from hypothesis import strategies as st

# Others become printable: see test_control_characters_from_another_rank_are_replaced.
texts = st.text(max_size=12).map(printable)
counts = st.integers(min_value=0, max_value=1 << 48)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
links = st.builds(Link, st.none() | counts, st.none() | st.booleans(), texts)
hosts = st.builds(Host, texts, texts, st.none() | texts, st.none() | counts)
devices = st.builds(
    Device,
    type=texts,
    uuid=texts,
    name=texts,
    capability=st.tuples(st.integers(0, 20), st.integers(0, 9)),
    memory_nbytes=counts,
    fabric=st.none() | texts,
    links=st.dictionaries(texts, links, max_size=4),
)
rank_infos = st.builds(
    RankInfo,
    global_rank=counts,
    host=hosts,
    device=st.none() | devices,
    allocator=st.none() | texts,
    versions=st.dictionaries(texts, texts, max_size=3),
    plugins=st.dictionaries(texts, texts, max_size=3),
    facts=st.dictionaries(texts, json_values, max_size=3),
    unknown=st.dictionaries(texts, texts, max_size=3),
)
topologies = st.builds(
    Topology,
    st.lists(rank_infos, min_size=1, max_size=3).map(tuple),
    st.lists(texts, min_size=1, max_size=2).map(tuple),
)


def recorded(name: str) -> Topology:
    return load_topologies()[name]


@given(topologies)
def test_json_brings_back_the_same_topology(topology: Topology) -> None:
    assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology


def test_json_leaves_out_what_is_not_known() -> None:
    info = RankInfo(0, Host("node", "id"), Device("cuda", "GPU-0", links={"GPU-1": Link(nvlinks=0, p2p=False)}))
    assert info.to_json() == {
        "global_rank": 0,
        "host": {"name": "node", "id": "id"},
        "device": {"type": "cuda", "uuid": "GPU-0", "links": {"GPU-1": {"nvlinks": 0, "p2p": False}}},
    }


@pytest.mark.parametrize("schema", [None, SCHEMA + 1, str(SCHEMA)])
def test_another_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ValueError, match="schema"):
        Topology.from_json({"schema": schema, "ranks": [], "device_types": ["cpu"]})


def test_eight_gpus_on_a_switch() -> None:
    topology = recorded("dgx-h100")
    assert topology.world_size == 8
    assert topology.one_host
    pairs = [(one, other) for one in range(8) for other in range(8) if one != other]
    assert all(topology.link(*pair) == Link(nvlinks=18, p2p=True) for pair in pairs)
    assert max(len(json.dumps(info.to_json())) for info in topology.ranks) < 2048


def test_two_gpus_without_nvlink() -> None:
    link = recorded("two-pcie-p2p").link(0, 1)
    assert link.nvlinks == 0
    assert link.p2p is True


def test_two_hosts() -> None:
    topology = recorded("two-hosts-of-4")
    assert not topology.one_host
    assert topology.link(0, 3).nvlinks == 18
    assert topology.link(3, 4).nvlinks is None
    assert topology.link(3, 4).p2p is None
    assert topology.link(3, 4).reason
    assert Topology.of(topology.ranks[4:]).one_host


def test_cpus() -> None:
    topology = recorded("cpus-one-host")
    assert topology.one_host
    assert topology.device_types == ("cpu",)
    assert topology.link(0, 1).p2p is None


def test_a_link_that_one_side_alone_reports_counts() -> None:
    host = Host("node", "id", "boot")
    seen = Link(nvlinks=4, p2p=True)
    one = RankInfo(0, host, Device("cuda", "GPU-0", links={"GPU-1": seen}))
    other = RankInfo(1, host, Device("cuda", "GPU-1"))
    topology = Topology.of([one, other])
    assert topology.link(0, 1) == topology.link(1, 0) == seen


def test_machines_by_their_numbers_of_ranks_and_hosts() -> None:
    known = load_topologies()
    hosts = {name: len({info.host.id for info in topology.ranks}) for name, topology in known.items()}
    assert {name: topology.world_size for name, topology in known.items() if hosts[name] > 1} == {
        "two-hosts-of-4": 8,
        "gb200-nvl72": 72,
        "gb200-two-hosts": 8,
        "two-dgx-h100": 16,
        "cpus-64-ranks": 64,
    }
    assert hosts["gb200-nvl72"] == 18
    assert {name: topology.world_size for name, topology in known.items() if topology.world_size not in (8, 72)} == {
        "cpus-one-host": 4,
        "two-pcie-p2p": 2,
        "two-dgx-h100": 16,
        "four-a100-pcie": 4,
        "two-rtx-4090": 2,
        "cpus-1-rank": 1,
        "cpus-3-ranks": 3,
        "cpus-64-ranks": 64,
    }
    assert all(describe_topologies()[name] for name in known)
    assert list(describe_topologies()) == list(known)


@pytest.mark.parametrize("name", load_topologies())
def test_a_machine_is_as_sound_as_a_recording(name: str) -> None:
    topology = load_topologies()[name]
    assert Topology.from_json(topology.to_json()) == topology
    assert [info.global_rank for info in topology.ranks] == list(
        range(topology.ranks[0].global_rank, topology.ranks[0].global_rank + topology.world_size)
    )
    uuids = [info.device.uuid for info in topology.ranks if info.device is not None]
    assert len(set(uuids)) == len(uuids) == (topology.world_size if "cuda" in topology.device_types else 0)
    for one, other in itertools.permutations(range(topology.world_size), 2):
        link = topology.link(one, other)
        assert link == topology.link(other, one)
        together = topology.ranks[one].host == topology.ranks[other].host
        # What isn't there has its reason, and hosts know nothing of each other's devices.
        assert (link.p2p is None) == (not uuids or not together)
        assert link.reason or (link.nvlinks and link.p2p)


def test_the_machines_gpus() -> None:
    found = {
        name: (device.capability, topology.link(0, 1).nvlinks, topology.link(0, 1).p2p)
        for name, topology in load_topologies().items()
        if (device := topology.ranks[0].device) is not None
    }
    assert found == {
        **dict.fromkeys(("dgx-h100", "two-hosts-of-4", "two-dgx-h100", "one-of-two-dgx-h100"), ((9, 0), 18, True)),
        **dict.fromkeys(("hgx-h200", "hgx-h20"), ((9, 0), 18, True)),
        **dict.fromkeys(("hgx-b200", "gb200-nvl72", "gb200-two-hosts"), ((10, 0), 18, True)),
        "hgx-a100": ((8, 0), 12, True),
        "four-a100-pcie": ((8, 0), 0, True),
        **dict.fromkeys(("two-pcie-p2p", "eight-l40s"), ((8, 9), 0, True)),
        "two-rtx-4090": ((8, 9), 0, False),
    }


def test_a_rack_is_one_nvlink_clique() -> None:
    fabrics = {info.device.fabric for info in load_topologies()["gb200-nvl72"].ranks if info.device is not None}
    assert len(fabrics) == 1
    assert None not in fabrics


def test_a_group_inside_one_of_two_hosts() -> None:
    whole, inside = (load_topologies()[name] for name in ("two-dgx-h100", "one-of-two-dgx-h100"))
    assert inside.one_host
    assert [info.global_rank for info in inside.ranks] == list(range(8, 16))
    assert [info.host for info in inside.ranks] == [info.host for info in whole.ranks[8:]]
