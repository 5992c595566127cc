"""The entry point: it registers this package's hooks where it knows SGLang, and leaves the rest alone."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comm_sglang import door
from sglang_ranks import STAND_IN, forget, logged, write_metadata


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget()
    monkeypatch.syspath_prepend(str(STAND_IN))
    yield
    forget()


def registered(version: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Return the functions that are hooked after `register`, and what was logged."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    registry: Any = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
    with logged() as lines:
        for _ in range(2):  # a second call changes nothing
            importlib.import_module("comm_sglang").register()
    assert all(len(hooks) == 1 for hooks in registry._hooks.values())
    return sorted(target.rpartition(".")[2] for target in registry._hooks), lines


@pytest.mark.parametrize("version", ["0.5.12", "0.5.15.post1", "0.5.23"])
@pytest.mark.usefixtures("sglang")
def test_known_releases_get_this_packages_hooks(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, lines = registered(version, monkeypatch)
    assert (targets, lines) == (["__init__", "all_reduce", "destroy", "dispatch_custom_allreduce"], [])


@pytest.mark.parametrize("version", ["0.5.11", "0.5.24", "0.6.0", "0.0.0.dev0", "dev"])
@pytest.mark.usefixtures("sglang")
def test_an_unknown_release_keeps_its_own_with_a_warning(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, lines = registered(version, monkeypatch)
    assert targets == []
    assert f"SGLang is {version}; expected 0.5.12 to 0.5.23" in lines[0]


@pytest.mark.usefixtures("sglang")
def test_comm_sglang_0_switches_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMM_SGLANG", "0")
    assert registered("0.5.23", monkeypatch) == ([], [])


@pytest.mark.parametrize(("version", "runner"), [("0.5.13", "ModelRunner"), ("0.5.14", "BaseRunner")])
@pytest.mark.usefixtures("sglang")
def test_fused_norms_can_be_left_to_sglang(version: str, runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    hooks: Any = importlib.import_module("comm_sglang.hooks")
    targets = [hook.target for hook in hooks.workers()]
    assert f".{runner}._pre_initialize" in targets[0]
    assert [target.rpartition(".")[2] for target in targets[1:]] == [
        "flashinfer_allreduce_residual_rmsnorm",
        "pre_initialize_workspaces",
    ]
    monkeypatch.setenv("COMM_SGLANG_FUSED", "0")
    assert [hook.target for hook in hooks.workers()] == targets[:1]


@pytest.mark.parametrize(
    ("installed", "environ", "replaces", "missing"),
    [
        ({}, {}, 0, None),
        ({}, {"SGLANG_PLUGINS": "other"}, 0, None),
        ({"sglang": "0.5.20"}, {}, 3, None),
        ({"sglang": "0.5.20"}, {"SGLANG_PLUGINS": ""}, 3, None),
        ({"sglang": "0.5.20"}, {"SGLANG_PLUGINS": "other, comm"}, 3, None),
        ({"sglang": "0.5.20"}, {"SGLANG_PLUGINS": "other"}, 0, "SGLANG_PLUGINS='other' doesn't name its plugin 'comm'"),
        ({"sglang": "0.5.20"}, {"COMM_SGLANG": "0", "SGLANG_PLUGINS": "other"}, 0, None),
        ({"sglang": "0.5.24"}, {}, 0, "it is written for SGLang 0.5.12 to 0.5.23, and sglang 0.5.24 is installed"),
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

    for name in ("COMM_SGLANG", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = door.describe()
    assert len(found.pop("replaces")) == replaces
    assert found == {"installed": installed, "off": "COMM_SGLANG" in environ, "missing": missing}


def test_registering_imports_nothing_of_core(tmp_path: Path) -> None:
    code = (
        "import sys, comm_sglang; comm_sglang.register()\n"
        "print([name for name in ('comm_core', 'sglang.srt.distributed.parallel_state') if name in sys.modules])"
    )
    paths = [str(write_metadata(tmp_path, "0.5.23")), str(STAND_IN), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
