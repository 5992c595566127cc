from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any

import pynvml
import pytest
import torch
from comm_core._probe.rank import Sources, probe_devices, probe_rank
from comm_core.topology import Device, Link, RankInfo
from fake_nvml import (
    MIG,
    NOT_SUPPORTED,
    NVLINK,
    READ,
    UUIDS,
    WRITE,
    FakeNvml,
    NVMLErrorOfFake,
    fake_torch,
    state_of_allocator,
)

CALLS = [name for name in vars(FakeNvml) if name.startswith("nvml")]


def probed(
    nvml: FakeNvml | BaseException | None = None,
    fake: Any = None,
    device: torch.device | None = torch.device("cuda", 0),  # noqa: B008 - it can't change
    environ: dict[str, str] | None = None,
) -> RankInfo:
    def load_nvml() -> Any:
        if isinstance(nvml, BaseException):
            raise nvml
        return nvml or FakeNvml()

    sources = Sources(torch=lambda: fake or fake_torch(), nvml=load_nvml, environ=environ or {})
    return probe_rank(3, device, plugins={"nccl": "0.1.0"}, facts={"nccl": {"built": True}}, sources=sources)


def device_of(info: RankInfo) -> Device:
    assert info.device is not None, info.unknown
    return info.device


def test_a_group_on_cpus_asks_for_no_accelerator() -> None:
    for device in (None, torch.device("cpu")):
        info = probed(nvml=RuntimeError("asked"), device=device)
        assert info.device is None
        assert info.allocator is None
        assert info.unknown == {}
        assert info.versions["torch"] == "2.13.0+cu130"
    assert info.global_rank == 3
    assert info.plugins == {"nccl": "0.1.0"}
    assert info.facts == {"nccl": {"built": True}}


def test_a_gpu_behind_a_switch_has_all_its_nvlinks_to_every_peer() -> None:
    nvml = FakeNvml(8)
    info = probed(nvml, fake_torch(8))
    assert info.unknown == {}
    assert info.device == Device(
        type="cuda",
        uuid=UUIDS[0],
        name="NVIDIA H100",
        capability=(9, 0),
        memory_nbytes=80 << 30,
        links=dict.fromkeys(UUIDS[1:], Link(nvlinks=18, p2p=True)),
    )
    assert info.allocator == "native"
    assert info.versions["driver"] == "580.95.05"
    assert info.versions["nccl"] == "2.29.7"
    assert nvml.users == 0
    assert len(json.dumps(info.to_json())) < 2048


def test_direct_nvlinks_are_counted_by_where_they_end() -> None:
    no_nvlink = {(0, 3, NVLINK): 5}
    nvml = FakeNvml(4, remotes={0: [1, 1, 2, 1]}, p2p=no_nvlink)
    links = device_of(probed(nvml)).links
    assert [links[uuid].nvlinks for uuid in UUIDS[1:4]] == [3, 1, 0]
    assert links[UUIDS[3]] == Link(nvlinks=0, p2p=True, reason="NVML: P2P_STATUS_NOT_SUPPORTED")


def test_nvlinks_that_cannot_be_counted_are_at_least_one() -> None:
    link = device_of(probed(FakeNvml(remotes={0: []}))).links[UUIDS[1]]
    assert link == Link(nvlinks=1, p2p=True, reason="NVML: the NVLinks can't be counted")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (1, "P2P_STATUS_CHIPSET_NOT_SUPPORTED"),
        (2, "P2P_STATUS_GPU_NOT_SUPPORTED"),
        (3, "P2P_STATUS_IOH_TOPOLOGY_NOT_SUPPORTED"),
        (4, "P2P_STATUS_DISABLED_BY_REGKEY"),
        (5, "P2P_STATUS_NOT_SUPPORTED"),
        (6, "P2P_STATUS_UNKNOWN"),
        (77, "P2P_STATUS_77"),
    ],
)
@pytest.mark.parametrize("refused", [READ, WRITE])
def test_peer_access_needs_reads_and_writes(refused: int, status: int, words: str) -> None:
    nvml = FakeNvml(p2p={(0, 1, refused): status, (0, 1, NVLINK): status})
    assert device_of(probed(nvml)).links[UUIDS[1]] == Link(nvlinks=0, p2p=False, reason=f"NVML: {words}")


def test_a_pair_that_nvml_cannot_judge_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setattr(nvml, "nvmlDeviceGetP2PStatus", raiser(NOT_SUPPORTED))
    assert device_of(probed(nvml)).links[UUIDS[1]] == Link(None, None, "NVML: Not Supported")


@pytest.mark.parametrize("visible", ["1", UUIDS[1], "GPU-00000000", "no such thing"])
def test_a_process_with_one_visible_gpu_knows_its_peers_by_uuid(visible: str) -> None:
    device = device_of(probed(fake=fake_torch(1, first=1), environ={"CUDA_VISIBLE_DEVICES": visible}))
    assert device.uuid == UUIDS[1]
    assert device.links == {UUIDS[0]: Link(nvlinks=18, p2p=True)}


def test_a_device_without_an_index_is_the_current_one() -> None:
    assert device_of(probed(device=torch.device("cuda"))).uuid == UUIDS[0]


@pytest.mark.parametrize("visible", [MIG, "0", ""])
def test_a_mig_instance_goes_by_its_own_uuid(visible: str) -> None:
    info = probed(FakeNvml(instance=MIG), environ={"CUDA_VISIBLE_DEVICES": visible})
    assert device_of(info).uuid == MIG
    assert device_of(info).links == {}
    assert "MIG" in info.unknown["device.links"]


def test_a_mig_instance_whose_uuid_the_runtime_reports_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_torch()
    properties = types.SimpleNamespace(name="H100 MIG 1g.10gb", major=9, minor=0, total_memory=10 << 30, uuid=MIG[4:])
    monkeypatch.setattr(fake.cuda, "get_device_properties", lambda _index: properties)
    assert device_of(probed(FakeNvml(instance=MIG), fake)).uuid == MIG


def test_without_nvml_cuda_tells_of_peer_access() -> None:
    info = probed(ImportError("no pynvml"))
    assert device_of(info).links == {UUIDS[1]: Link(p2p=True, reason="NVLinks unknown without NVML")}
    assert info.unknown == {"device.links": "ImportError: no pynvml"}
    refused = probed(ImportError("no pynvml"), fake_torch(peers=False))
    assert device_of(refused).links == {UUIDS[1]: Link(p2p=False, reason="CUDA: no peer access")}
    assert device_of(probed(ImportError(), environ={"CUDA_VISIBLE_DEVICES": MIG})).uuid == MIG


@pytest.mark.parametrize(
    ("fabric", "expected"),
    [
        (None, None),
        ((3, bytes(16)), None),
        ((2, bytes(range(16))), None),
        ((3, bytes(range(16))), "00010203-0405-0607-0809-0a0b0c0d0e0f/5"),
    ],
)
def test_the_fabric_is_one_that_was_joined(fabric: tuple[int, bytes] | None, expected: str | None) -> None:
    info = probed(FakeNvml(fabric=fabric))
    assert device_of(info).fabric == expected
    assert info.unknown == {}


@pytest.mark.parametrize(
    ("snapshot", "expected"),
    [
        (state_of_allocator(), "native"),
        (state_of_allocator(segments=(False, False)), "native"),
        (state_of_allocator(setting=True), "expandable_segments"),
        (state_of_allocator(segments=(False, True)), "expandable_segments"),
    ],
)
def test_the_allocator_is_what_it_is_now(snapshot: Any, expected: str) -> None:
    info = probed(fake=fake_torch(snapshot=snapshot), environ={"PYTORCH_CUDA_ALLOC_CONF": "backend:native"})
    assert info.allocator == expected


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_where_the_allocator_does_not_tell_the_environment_does(variable: str) -> None:
    without = fake_torch(snapshot={"segments": []})
    info = probed(fake=without, environ={variable: "max_split_size_mb:64, expandable_segments: True"})
    assert info.allocator == "expandable_segments"
    assert "allocator" in info.unknown
    assert probed(fake=without).allocator == "native"


def test_another_allocator_goes_by_its_name() -> None:
    assert probed(fake=fake_torch(backend="cudaMallocAsync")).allocator == "cudaMallocAsync"


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [NOT_SUPPORTED, OSError("gone"), SystemExit(1)], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("call", CALLS)
def test_no_failure_of_nvml_is_raised(monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException) -> None:
    nvml = FakeNvml(3, remotes={0: [1, 2]})
    monkeypatch.setattr(nvml, call, raiser(error))
    info = probed(nvml)
    assert device_of(info).uuid == UUIDS[0]
    assert RankInfo.from_json(json.loads(json.dumps(info.to_json()))) == info
    assert nvml.users == (1 if call == "nvmlShutdown" else 0)


@pytest.mark.parametrize(
    "error", [RuntimeError("driver too old"), SystemExit(1)], ids=lambda error: type(error).__name__
)
def test_no_failure_of_torch_is_raised(error: BaseException) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise error

    info = probed(fake=Broken("torch"))
    assert info.device is None
    assert {"device", "allocator", "versions.torch"} <= set(info.unknown)


def test_an_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        probed(KeyboardInterrupt())


def test_devices_of_other_types_are_left_out_with_the_reason() -> None:
    info = probed(device=torch.device("xpu", 0))
    assert info.device is None
    assert "xpu" in info.unknown["device"]


def test_reasons_stay_short() -> None:
    info = probed(RuntimeError("long\nwords " * 200))
    assert len(info.unknown["device.links"]) <= 160
    assert "\n" not in info.unknown["device.links"]


def test_listing_needs_no_torch_and_survives_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(3)

    def get(index: int) -> int:
        if index == 1:
            raise NVMLErrorOfFake(15, "GPU is lost")
        return index

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", get)
    unknown: dict[str, str] = {}
    sources = Sources(torch=raiser(ImportError()), nvml=lambda: nvml)
    devices, driver = probe_devices(sources, unknown)
    assert [device.uuid for device in devices] == [UUIDS[0], UUIDS[2]]
    assert devices[0].links == {UUIDS[2]: Link(nvlinks=18, p2p=True)}
    assert driver == "580.95.05"
    assert unknown == {"NVML's device 1": "NVML: GPU is lost"}
    assert nvml.users == 0


def test_the_fake_has_the_names_and_numbers_of_the_real_one() -> None:
    names = [name for name in vars(FakeNvml) if name.lower().startswith(("nvml", "c_nvml"))]
    assert len(names) > len(CALLS)
    for name in names:
        real = getattr(pynvml, name)
        if isinstance(real, int):
            assert real == getattr(FakeNvml, name), name
