"""A GPU for each rank of a host, from made-up evidence."""

from __future__ import annotations

import random

import pytest
from comm_core._plan.checks import check_devices
from comm_core._plan.decide import Evidence
from comm_core.errors import NegotiationError
from comm_core.topology import Device, Host, RankInfo


def on(uuid: str | None, host: str = "a") -> Evidence:
    """A rank that uses this GPU on this host; containers of one machine have one name and boot ID, but several ids."""
    return Evidence(RankInfo(0, Host("node", host, "boot"), None if uuid is None else Device("cuda", uuid)))


def label(*ranks: int) -> str:
    return f"ranks {', '.join(map(str, ranks))}"


@pytest.mark.parametrize(
    "evidence",
    [
        [on(None)] * 3,
        [on("GPU-0"), on("GPU-1"), on(None), on(None)],
        [on("MIG-0"), on("MIG-1")],
        [on("GPU-0", "a"), on("GPU-0", "b")],
    ],
    ids=["CPUs", "GPUs and CPUs", "instances of one GPU", "two containers"],
)
def test_ranks_with_devices_of_their_own_may_negotiate(evidence: list[Evidence]) -> None:
    check_devices(evidence, label)


def test_ranks_that_use_one_gpu_are_named_with_the_remedy() -> None:
    with pytest.raises(NegotiationError) as raised:
        check_devices([on("GPU-1"), on("GPU-0"), on("GPU-2"), on("GPU-0")], label)
    assert str(raised.value) == (
        "ranks 1, 3 use the same GPU, GPU-0, on host node. The negotiation fails, because NCCL and others need a GPU "
        "for each rank. Call torch.cuda.set_device(local_rank) before comm.get_backend, or pass device_id to "
        "init_process_group. Ranks that have to share a GPU need a group with backend='gloo'"
    )


def test_the_text_stays_short_for_many_ranks() -> None:
    with pytest.raises(NegotiationError, match=r"^ranks 0, 1, 2, 3, 4, 5, 6, 7 and 56 more use the same GPU"):
        check_devices([on("GPU-0")] * 64, label)


def test_made_up_groups_fail_just_if_a_host_has_a_gpu_twice() -> None:
    failed = 0
    for seed in range(2000):
        rng = random.Random(seed)  # noqa: S311 - no secret
        uses = [(rng.choice("abcd"), rng.choice([None, *range(12)])) for _ in range(rng.randint(1, 6))]
        evidence = [on(None if number is None else f"GPU-{number}", host) for host, number in uses]
        users = [use for use in uses if use[1] is not None]
        if len(set(users)) == len(users):
            check_devices(evidence, label)
        else:
            failed += 1
            with pytest.raises(NegotiationError, match="use the same GPU"):
                check_devices(evidence, label)
    assert 100 < failed < 1900
