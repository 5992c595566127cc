"""Process groups out of the ordinary: made by hand, for other accelerators, with made-up ranks, on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import group_ranks
import pytest
from fake_nvml import UUIDS
from harness import install

if TYPE_CHECKING:
    from harness import Ranks


@pytest.mark.parametrize("initialised", [True, False])
@pytest.mark.parametrize("name", ["", "tp"])
def test_a_group_made_by_hand_is_refused_with_the_remedy(ranks: Ranks, initialised: bool, name: str) -> None:
    """torch.distributed knows neither its ranks nor its store, whether or not it got a name."""
    for error, text in ranks.run(group_ranks.get_of_a_handmade_group, initialised, name):
        assert error == "ValueError"
        assert "made by hand" in text
        assert text.endswith("Create it with torch.distributed.init_process_group or new_group")
        assert ("destroyed" in text) == bool(name)


def test_what_is_no_group_is_a_wrong_type_with_and_without_a_world(ranks: Ranks) -> None:
    for error, text in ranks.run(group_ranks.get_without_a_world, "tp"):
        assert error == "TypeError"
        assert "expected a torch.distributed process group" in text


def test_a_mesh_of_one_dimension_is_a_group(ranks: Ranks) -> None:
    for rank, (total, whole, without) in enumerate(ranks.run(group_ranks.get_of_a_mesh, world_size=4)):
        assert total == (1, 1, 5, 5)[rank]
        assert whole == ("ValueError", "the mesh has 2 dimensions; pass one of them, such as mesh['tp']")
        assert without == (
            ("ok", "")
            if rank < 2
            else ("ValueError", f"rank {rank} isn't in this mesh. Make the call on the mesh's ranks only")
        )


@pytest.mark.parametrize("backend", ["xpu:dummyccl", "cuda:gloo", "cuda:gloo,xpu:dummyccl"])
def test_a_group_that_core_has_no_routes_for_is_refused_at_once(ranks: Ranks, backend: str) -> None:
    found = ranks.run(group_ranks.get_over, backend)
    assert found[0] == found[1]
    error, text = found[0]
    assert error == "NegotiationError"
    assert text.startswith(f"this group can't negotiate: its torch.distributed backends are {backend}, and comm_core")


@pytest.mark.parametrize("backend", ["cpu:gloo,xpu:dummyccl", "cpu:gloo", "cpu:gloo,cuda:gloo"])
def test_a_group_with_another_accelerator_serves_its_cpu_tensors(ranks: Ranks, backend: str) -> None:
    assert ranks.run(group_ranks.get_over, backend) == [("ok", "torch_distributed")] * 2


def test_a_group_for_gpus_alone_that_torch_sees_none_of(ranks: Ranks) -> None:
    """Each rank sees that by itself, so they tell each other."""
    found = ranks.run(group_ranks.get_over, "cuda:dummyccl", env={"CUDA_VISIBLE_DEVICES": ""})
    assert found[0] == found[1]
    error, text = found[0]
    assert error == "NegotiationError"
    assert "torch sees no GPU" in text


@pytest.mark.parametrize("store", ["fake", "hash"])
def test_one_process_that_plays_a_rank_of_many_is_served_by_torch_alone(ranks: Ranks, store: str) -> None:
    (found,) = ranks.run(group_ranks.play_a_rank_of_many, store, world_size=1)
    served: dict[str, Any] = {"name": "torch_distributed", "copy": True, "in place": True, "same": True}
    assert found["world"] == served | {"normed": [2, 3], "ranks": list(range(8))}
    assert found["subgroup"] == served | {"normed": [2, 3], "ranks": [1, 3, 5]}
    assert found["fake tensor"] == [5, 7]
    assert found["fallback named"] == ("ok", "torch_distributed")
    error, text = found["named"]
    assert error == "BackendUnavailableError"
    assert "backend 'shm' was named for group" in text
    assert "torch's backend \"fake\" plays the group's other ranks" in text


def test_ranks_that_are_threads_are_refused_at_once(ranks: Ranks) -> None:
    (found,) = ranks.run(group_ranks.get_in_threads, world_size=1)
    for error, text in found:
        assert error == "NegotiationError"
        assert "its ranks are threads of one process" in text


@pytest.mark.parametrize(("devices", "users"), [((0, 0), "ranks 0, 1"), ((5, 1, 5), "ranks 0, 2")])
def test_ranks_that_set_no_device_raise_together(ranks: Ranks, devices: tuple[int, ...], users: str) -> None:
    found = ranks.run(group_ranks.get_on_gpus, devices, None, world_size=len(devices))
    assert found == [found[0]] * len(devices)
    error, text = found[0]
    assert error == "NegotiationError"
    assert f"{users} use the same GPU, {UUIDS[devices[0]]}, on host " in text


def test_a_group_bound_to_devices_goes_by_those(ranks: Ranks) -> None:
    found = ranks.run(group_ranks.get_on_gpus, (0, 1), (3, 3))
    assert found[0] == found[1]
    assert f"ranks 0, 1 use the same GPU, {UUIDS[3]}, on host " in found[0][1]


def test_the_longest_timeout_is_one_that_all_can_wait_for(ranks: Ranks, tmp_path: Path) -> None:
    folder = install(tmp_path / "acme", "acme", "import own_group_ranks\nplugin = own_group_ranks.Summing()")
    assert ranks.run(group_ranks.wait_the_longest, path=[[folder]] * 2) == [("acme", 2.0)] * 2
