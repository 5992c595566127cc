"""The plugin from the documentation, built outside this checkout and installed by name, serves a real group."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from wheelhouse import ROOT, BuildWheel, Pip, Venv

WORLD_SIZE = 2

JOB = """
import importlib.metadata
import json
import os
import pathlib

import comm_core
import thirdparty_collectives
import torch
import torch.distributed as dist

# Two ranks, with one import of torch.
os.environ["RANK"] = "0"
child = os.fork()
if child == 0:
    os.environ["RANK"] = "1"
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", world_size=2, rank=int(os.environ["RANK"]))
group = dist.group.WORLD
rank = dist.get_rank()

backend = comm_core.get_backend(group)
x = torch.full((1024,), float(rank + 1))
y = backend.all_reduce(x)
facts = {
    "files": [module.__file__ for module in (comm_core, thirdparty_collectives)],
    "entry_points": [entry.name for entry in importlib.metadata.entry_points(group="comm_core.backends")],
    "name": backend.name,
    "routed_to": backend.decision.route("all_reduce", "eager", "cpu", "float32").backend_for(x.nbytes),
    "input": x.unique().tolist(),
    "sum": y.unique().tolist(),
    "in_place": backend.all_reduce(x, out=x) is x and torch.equal(x, y),
    "explained": "thirdparty" in str(backend.explain()),
}
comm_core.close(group)
dist.destroy_process_group()
pathlib.Path(f"rank{rank}.json").write_text(json.dumps(facts))
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the files of docs/writing-a-plugin.md."""
    folder = tmp_path_factory.mktemp("third_party")
    page = (ROOT / "docs" / "writing-a-plugin.md").read_text()
    for name, text in re.findall(r"^```\w+\n# ([\w.]+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        (folder / name).write_text(text)
    assert {path.name for path in folder.iterdir()} == {"pyproject.toml", "thirdparty_collectives.py"}
    return folder


@pytest.fixture(scope="module")
def installed(third_party: Path, build_wheel: BuildWheel, pip: Pip, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """A venv in which core and the plugin are installed by name, from wheels in a folder."""
    folder = tmp_path_factory.mktemp("installed")
    wheels = folder / "wheels"
    wheels.mkdir()
    core = build_wheel(ROOT / "core")
    for wheel in (core, build_wheel(third_party)):
        (wheels / wheel.name).symlink_to(wheel)
    fresh = Venv(folder, ["comm-core"])
    pip(
        "--python", fresh.python, "install", "--no-index", "--find-links", wheels, "comm-core", "thirdparty-collectives"
    )
    return fresh


def test_core_is_installed_by_name_outside_the_checkout(installed: Venv, clean_environ: dict[str, str]) -> None:
    code = "import comm_core; from importlib.metadata import version; print(comm_core.__file__, version('comm-core'))"
    output = subprocess.run(
        [installed.python, "-c", code],
        cwd=installed.folder,
        env=clean_environ,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    file, version = output.split()
    assert Path(file) == installed.site_packages / "comm_core" / "__init__.py"
    assert version in (ROOT / "core" / "src" / "comm_core" / "_version.py").read_text()
    assert (installed.folder / "bin" / "comm-core").is_file()
    assert not (installed.folder / "bin" / "comm").exists()


def test_without_comm_bench_its_command_says_what_to_install(installed: Venv, clean_environ: dict[str, str]) -> None:
    command = [installed.folder / "bin" / "comm-core", "bench", "-b", "8K"]
    done = subprocess.run(command, cwd=installed.folder, env=clean_environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "comm-core: error: 'bench' isn't installed: pip install comm-bench"


def test_plugin_serves_a_group(installed: Venv, clean_environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    job = subprocess.Popen(
        [installed.python, "job.py"],
        cwd=tmp_path,
        env={**clean_environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # both ranks
        job.wait()
    assert job.returncode == 0, output
    site = installed.site_packages
    for rank in range(WORLD_SIZE):
        facts = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert facts == {
            "files": [
                str(site / "comm_core" / "__init__.py"),
                str(site / "thirdparty_collectives.py"),
            ],
            "entry_points": ["thirdparty"],
            "name": "thirdparty",
            "routed_to": "thirdparty",
            "input": [rank + 1],
            "sum": [3],
            "in_place": True,
            "explained": True,
        }
