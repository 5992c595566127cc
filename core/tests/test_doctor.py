from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comm_core import cli
from comm_core._plugins import discovery
from comm_core._probe.rank import Sources
from comm_core._topologies import load_topologies
from comm_core.cli._report import PluginLine, Problem, Report, diagnose, render, to_json
from comm_core.cli.doctor import collect
from comm_core.env import Settings
from comm_core.topology import Device, Host, Link
from fake_nvml import UUIDS, FakeNvml

ROOM = 8 << 30


def report(**changes: Any) -> Report:
    """A host with two GPUs and nothing to fix, but for the changes."""
    one, other = (Device("cuda", uuid, "NVIDIA H100", (9, 0), 80 << 30) for uuid in UUIDS[:2])
    fine = Report(
        versions={
            "comm_core": "0.1.0",
            "python": "3.12.8",
            "torch": "2.13.0+cu130",
            "cuda": "13.0",
            "driver": "580",
        },
        torch={"cuda": True, "process_groups": ["gloo", "nccl"]},
        host=Host("node", "boot ipc 1:2 shm 3:4", "boot", ROOM),
        devices=(
            dataclasses.replace(one, links={other.uuid: Link(nvlinks=18, p2p=True)}),
            dataclasses.replace(other, links={one.uuid: Link(nvlinks=18, p2p=True)}),
        ),
        environment={},
        settings=Settings(),
        misspelt=(),
        plugins=(PluginLine("nccl", "comm-plugin-nccl", "0.1.0", usable=True),),
        unknown={},
    )
    return dataclasses.replace(fine, **changes)


def doctor(*args: str, python_path: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    here = {name: value for name, value in os.environ.items() if not name.startswith("COMM_CORE_")}
    paths = [str(python_path)] if python_path else []
    here["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [here.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "comm_core", "doctor", *args],
        env=here | environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=250,
    )


def test_nothing_to_fix() -> None:
    assert diagnose(report()) == ()
    assert render(report(), ()).endswith("Nothing to fix.")


NO_TORCH = {"comm_core": "0.1.0", "python": "3.12.8"}
CPU_TORCH = {**NO_TORCH, "torch": "2.13.0+cpu"}
GLOO = {"cuda": False, "process_groups": ["gloo"]}


BAD = Problem("is_available returned NoneType", "Return comm_core.Available or comm_core.Unavailable.")


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"versions": NO_TORCH, "torch": {}, "unknown": {"versions.torch": "OSError: x"}}, "imported: OSError", "pip"),
        ({"versions": {**NO_TORCH, "torch": "2.7.1", "cuda": "12.6"}}, "2.7.1 is older", "torch>=2.8"),
        ({"torch": {"cuda": False, "process_groups": []}, "devices": ()}, "no process groups", "torch.distributed"),
        ({"versions": CPU_TORCH, "torch": GLOO}, "without CUDA", "CUDA build"),
        ({"torch": GLOO, "unknown": {"torch.cuda": "RuntimeError: driver too old"}}, "too old", "driver (580)"),
        ({"torch": GLOO, "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "hides all 2 GPUs", "Unset"),
        ({"devices": (), "unknown": {"nvml": "NVML: Not Found"}}, "NVML can't be used", "nvidia-ml-py"),
        ({"torch": {"cuda": True, "process_groups": ["gloo"]}}, "without NCCL", "NCCL"),
        ({"unknown": {"NVML's device 1": "NVML: GPU is lost"}}, "GPU is lost", "nvidia-smi"),
        ({"unknown": {"host.boot_id": "OSError: x"}}, "host of its own", "/proc"),
        ({"unknown": {"host.id": "OSError: x"}}, "IPC namespace", "a tmpfs"),
        ({"host": Host("node", "id", "boot", 64 << 20)}, "64.0 MiB", "--shm-size"),
        ({"settings": None, "unknown": {"settings": "ValueError: COMM_CORE_X='y'"}}, "COMM_CORE_X", "unset"),
        ({"misspelt": ("COMM_CORE_BACKEND",)}, "COMM_CORE_BACKEND means", "COMM_CORE_BACKENDS?"),
        ({"settings": Settings(disable=("ncll",))}, "COMM_CORE_DISABLE names 'ncll'", "Did you mean nccl?"),
        ({"settings": Settings(backends=("NCCL",))}, "COMM_CORE_BACKENDS names 'NCCL'", "Did you mean nccl?"),
        ({"settings": Settings(disable=("gone",))}, "COMM_CORE_DISABLE names 'gone'", "nccl, torch_distributed"),
        ({"settings": Settings(disable=("torch_distributed",))}, "can't be disabled", "Remove the name"),
        ({"plugins": (PluginLine("a", None, None, True, faults=(BAD,)),)}, "plugin 'a': is_available", "Return"),
        ({"unknown": {"plugins": "ImportError: x"}}, "can't be listed: ImportError", "comm-core"),
        ({"plugins": (PluginLine("a", None, None, False, "it broke", "Mend a."),)}, "'a' can't be used: it", "Mend a."),
    ],
)
def test_one_thing_to_fix(changes: dict[str, Any], what: str, fix: str) -> None:
    found = report(**changes)
    problems = diagnose(found)
    assert len(problems) == 1, problems
    assert what in problems[0].what
    assert fix in problems[0].fix
    text = render(found, problems)
    assert text.endswith(f"To fix\n  1. {problems[0].what}\n     {problems[0].fix}")
    assert json.loads(json.dumps(to_json(found, problems)))["problems"] == [dataclasses.asdict(problems[0])]


def test_a_plugins_own_variable_and_the_terminal_fallback_are_fine() -> None:
    settings = Settings(backends=("nccl", "torch_distributed"))
    assert diagnose(report(misspelt=("COMM_CORE_SHM_SLOTS",), settings=settings)) == ()


def test_a_host_without_gpus_has_nothing_to_fix() -> None:
    unknown = {"nvml": "NVML: NVML Shared Library Not Found", "torch.cuda": "AssertionError: not compiled with CUDA"}
    assert diagnose(report(versions=CPU_TORCH, torch=GLOO, devices=(), unknown=unknown)) == ()


LACKING = PluginLine("fast", "dist-fast", "1.0", usable=True, facts={"missing": "nvcc isn't on PATH"})


def test_what_a_plugin_misses_is_to_be_fixed_where_there_are_gpus() -> None:
    (problem,) = diagnose(report(plugins=(LACKING,)))
    assert problem.what == "plugin 'fast' can't serve on this host: nvcc isn't on PATH"
    assert "COMM_CORE_DISABLE=fast" in problem.fix
    assert diagnose(report(versions=CPU_TORCH, torch=GLOO, devices=(), plugins=(LACKING,))) == ()
    assert diagnose(report(plugins=(dataclasses.replace(LACKING, facts={"missing": None}),))) == ()


@pytest.mark.parametrize("serves_cpus", [False, True])
def test_what_a_plugin_for_cpus_misses_is_to_be_fixed_on_any_host(serves_cpus: bool) -> None:
    plugin = PluginLine("shm", None, "0.1.0", usable=True, facts={"missing": "no compiler"}, serves_cpus=serves_cpus)
    problems = diagnose(report(devices=(), torch=GLOO, versions=CPU_TORCH, plugins=(plugin,)))
    assert [problem.what for problem in problems] == [
        "plugin 'shm' can't serve on this host: no compiler"
    ] * serves_cpus


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ({"is_available": lambda _: None}, "is_available returned NoneType"),
        ({"is_available": lambda _: 1 / 0}, "is_available raised ZeroDivisionError"),
        ({"probe": lambda: [1]}, "the facts of probe can't be sent"),
    ],
)
def test_a_hook_that_breaks_its_contract_is_to_be_fixed(
    monkeypatch: pytest.MonkeyPatch, hooks: dict[str, Any], words: str
) -> None:
    plugin = discovery.Plugin("bad", "dist-bad", "1.0", hooks)
    found = discovery.Discovery(plugins={"bad": plugin}, failures={}, listed={"bad": "1.0"})
    monkeypatch.setattr(discovery, "discover", lambda *_: found)
    problems = diagnose(collect(Sources(environ={})))
    (problem,) = [problem for problem in problems if "plugin 'bad'" in problem.what]
    assert words in problem.what
    assert f"It is at {__file__}:" in problem.fix
    assert "COMM_CORE_DISABLE=bad" in problem.fix


def test_on_this_machine_without_a_compiler() -> None:
    done = doctor("--json", PATH="/nonexistent", CXX="", COMM_CORE_BACKEND="nccl")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["environment"]["COMM_CORE_BACKEND"] == "nccl"
    assert found["versions"]["torch"]
    assert any("COMM_CORE_BACKENDS" in problem["fix"] for problem in found["problems"])
    what = "\n".join(problem["what"] for problem in found["problems"])
    assert "plugin 'shm' can't serve on this host: it has to be compiled here" in what
    assert "plugin 'nccl' can't serve" not in what


def test_fixes_are_numbered() -> None:
    plugins = tuple(PluginLine(name, None, None, usable=False, reason="it broke", remedy="Mend it.") for name in "abc")
    text = render(report(plugins=plugins), diagnose(report(plugins=plugins)))
    assert [line[:5] for line in text.splitlines()[-6::2]] == ["  1. ", "  2. ", "  3. "]


def test_what_other_software_says_is_printed_without_its_control_characters() -> None:
    odd = "\x1b[2J\udcff"
    plugins = (
        PluginLine(f"a{odd}", odd, odd, usable=False, reason=f"it\nbroke{odd}", remedy=f"Mend it.{odd}"),
        PluginLine("b", None, None, usable=True, facts={"missing": f"no{odd}", "path": "x" * 100_000}),
    )
    found = report(
        plugins=plugins,
        environment={"COMM_CORE_X": "y" * 100_000 + odd},
        host=Host(f"node{odd}", "id"),
        unknown={odd: odd},
    )
    text = render(found, diagnose(found))
    assert all(line.isprintable() for line in text.split("\n"))
    assert max(map(len, text.split("\n"))) < 2100
    assert "it broke?[2J?" in text


def test_the_link_matrix() -> None:
    ranks = load_topologies()["dgx-h100"].ranks
    devices = [info.device for info in ranks if info.device is not None]
    refused = Link(nvlinks=0, p2p=False, reason="NVML: P2P_STATUS_CHIPSET_NOT_SUPPORTED")
    changed = {devices[1].uuid: refused, devices[2].uuid: Link(nvlinks=0, p2p=True), devices[3].uuid: Link()}
    devices[0] = dataclasses.replace(devices[0], links={**devices[0].links, **changed})
    lines = render(report(devices=devices), ()).splitlines()
    top = lines.index("Links")
    assert lines[top + 1].split() == [f"GPU{index}" for index in range(8)]
    assert lines[top + 2].split() == ["GPU0", "X", "no", "P2P", "?", "NV18", "NV18", "NV18", "NV18"]
    assert lines[top + 3].split() == ["GPU1", "NV18", "X", *["NV18"] * 6]
    assert "  NVML: P2P_STATUS_CHIPSET_NOT_SUPPORTED: GPU0-GPU1" in lines


def test_collecting_from_nvml() -> None:
    def no_torch() -> Any:
        raise SystemExit(1)

    found = collect(Sources(torch=no_torch, nvml=lambda: FakeNvml(2), environ={"COMM_CORE_DISABLE": "a"}))
    assert [device.uuid for device in found.devices] == list(UUIDS[:2])
    assert found.versions["driver"] == "580.95.05"
    assert "torch" not in found.versions
    assert found.environment == {"COMM_CORE_DISABLE": "a"}


def test_it_prints_where_discovery_breaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_args: object) -> Any:
        raise RuntimeError("metadata is gone")

    monkeypatch.setattr(discovery, "discover", broken)
    assert cli.main(["doctor"]) == 1
    assert "plugins can't be listed: RuntimeError: metadata is gone" in capsys.readouterr().out


def test_plugins_are_listed_with_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def plugin(name: str, **hooks: Any) -> discovery.Plugin:
        return discovery.Plugin(name, f"dist-{name}", "1.0", hooks)

    def no_compiler() -> Any:
        raise OSError("no compiler")

    plugins = [plugin("plain"), plugin("telling", probe=lambda: {"nvcc": "13.0"}), plugin("broken", probe=no_compiler)]
    failure = discovery.LoadFailure("late", "dist-late", "2.0", "its import raised ImportError: x", "Reinstall it.")
    result = discovery.Discovery(
        plugins={item.name: item for item in plugins},
        failures={"late": failure},
        listed=dict.fromkeys(("plain", "telling", "broken", "late"), "1.0") | {"blocked": "3.0"},
    )
    wanted_names: list[str] = []

    def discover(wanted: Any, *_: object) -> discovery.Discovery:
        wanted_names.extend(name for name in result.listed if wanted(name))
        return result

    monkeypatch.setattr(discovery, "discover", discover)
    lines = {line.name: line for line in collect(Sources(environ={"COMM_CORE_DISABLE": "blocked"})).plugins}
    assert wanted_names == ["plain", "telling", "broken", "late"]
    assert {name: line.usable for name, line in lines.items()} == {
        "blocked": None,
        "broken": False,
        "late": False,
        "plain": True,
        "telling": True,
    }
    assert lines["telling"].facts == {"nvcc": "13.0"}
    assert "no compiler" in lines["broken"].reason
    assert lines["late"].remedy == "Reinstall it."


def test_integrations_are_listed_with_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = (
        "def fits():\n    return {'engine': '1.2', 'missing': None}\n"
        "def idle():\n    return {'missing': 'the engine is too old'}\n"
        "def broken():\n    raise OSError('no engine')\n"
    )
    (tmp_path / "made_up_engine.py").write_text(module)
    info = tmp_path / "made_up_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-engine\nVersion: 1.0\n")
    names = ("fits", "idle", "broken", "absent")
    entries = "".join(f"{name} = made_up_engine:{name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[comm_core.integrations]\n{entries}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(discovery, "discover", lambda *_: discovery.Discovery(plugins={}, failures={}, listed={}))
    found = collect(Sources(environ={}))
    problems = diagnose(found)
    text = render(found, problems)
    section = text.partition("\nIntegrations\n")[2].partition("\n\n")[0]
    assert "fits 1.0: loaded; engine: 1.2" in section
    assert (
        "integration 'idle' has no effect: the engine is too old\n     Fix that, or uninstall made-up-engine." in text
    )
    assert "integration 'broken' can't be used: its made_up_engine:broken failed: OSError: no engine" in text
    assert "integration 'absent' can't be used: its made_up_engine:absent failed: AttributeError" in text
    lines = json.loads(json.dumps(to_json(found, problems)))["integrations"]
    usable = {line["name"]: line["usable"] for line in lines if line["distribution"] == "made-up-engine"}
    assert usable == {"fits": True, "idle": True, "broken": False, "absent": False}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Panic(BaseException): pass\nraise Panic('\\u2620')", "Panic"),
        ("", "AttributeError"),
    ],
    ids=["raises", "exits", "panics", "is empty"],
)
def test_a_torch_that_cannot_be_imported(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(body, encoding="utf-8")
    done = doctor(python_path=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "\nHost\n" in done.stdout
    assert "To fix\n  1. torch can't be imported: " in done.stdout
    assert words in done.stdout
    if body:
        return
    as_json = doctor("--json", python_path=tmp_path)
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["schema"] == 1
    assert json.loads(as_json.stdout)["host"]["name"]


def test_usage() -> None:
    done = doctor("--jsn")
    assert done.returncode == 2
    assert done.stdout == ""


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, comm_core.cli.doctor; sys.exit('torch' in sys.modules or 'pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_reader_that_ends_early_ends_the_report_quietly(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('takes too long for this test')\n")
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does once it has enough
    try:
        done = subprocess.run(
            [sys.executable, "-m", "comm_core", "doctor"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=200,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
