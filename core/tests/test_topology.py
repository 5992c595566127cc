from __future__ import annotations

import json
from typing import Any

import pytest
from comm_core._schema import printable
from comm_core._topologies import load_topologies
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


def test_core_brings_recorded_machines_and_groups_of_cpus() -> None:
    sizes = {name: topology.world_size for name, topology in load_topologies().items()}
    recorded_sizes = {"cpus-one-host": 4, "dgx-h100": 8, "two-hosts-of-4": 8, "two-pcie-p2p": 2}
    assert sizes == recorded_sizes | {"cpus-1-rank": 1, "cpus-3-ranks": 3, "cpus-8-ranks": 8, "cpus-64-ranks": 64}
    assert len({info.host.id for info in load_topologies()["cpus-64-ranks"].ranks}) == 8
