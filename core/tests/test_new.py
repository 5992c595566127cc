"""The project that `comm-core new` writes: it can be built and installed at once, and serves."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import comm_core as comm
import pytest
import torch
import torch.distributed as dist
from comm_core import cli
from comm_core._plugins import discovery, installed
from comm_core.cli import new
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from harness import Ranks

# An underscore at the end, with which no distribution's name can end.
NAME = "my_ring_"


def pip(*arguments: object, **environ: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def installed_in(folder: Path, project: Path, **environ: str) -> Path:
    """Build the project's wheel, with these environment variables; return a folder in which it is installed."""
    wheels = folder / "wheels"
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", wheels, project, **environ)
    (wheel,) = wheels.glob("*.whl")
    pip("install", "--no-deps", "--no-index", "--target", folder / "packages", wheel)
    return folder / "packages"


@contextlib.contextmanager
def only(site: Path) -> Iterator[None]:
    """Let this process see the plugins of `site`, and no others."""
    metadata, before = vars(installed)["metadata"], set(sys.modules)
    seen = SimpleNamespace(distributions=lambda **kwargs: metadata.distributions(path=[str(site)], **kwargs))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setattr(installed, "metadata", seen)
        discovery.reset()
        yield
    discovery.reset()
    for name in set(sys.modules) - before:
        if name.startswith("comm_plugin_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "some" / "folder"
    assert cli.main(["new", NAME, "--folder", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the project is installed from its wheel."""
    return installed_in(tmp_path_factory.mktemp("site"), project)


def test_the_files(project: Path) -> None:
    files = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
    module, test = f"src/comm_plugin_{NAME}/__init__.py", f"tests/test_{NAME}.py"
    assert files == {"pyproject.toml", "README.md", module, test}
    texts = {path: (project / path).read_text() for path in files}
    assert not [path for path, text in texts.items() if "$" in text]
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= 120
    assert len(texts[module].splitlines()) <= 40
    assert len(texts[test].splitlines()) <= 10
    case = ast.parse(texts[test]).body[-1]
    assert isinstance(case, ast.ClassDef)
    assert ast.unparse(case) == f"class TestMyRing(BackendConformance):\n    backend = '{NAME}'"


def test_the_distribution(site: Path) -> None:
    (found,) = distributions(path=[str(site)])
    assert (found.metadata["Name"], found.version) == ("comm-plugin-my-ring", "0.1.0")
    assert [(entry.group, entry.name, entry.value) for entry in found.entry_points] == [
        (discovery.GROUP, NAME, f"comm_plugin_{NAME}")
    ]
    required = {(item.name, *item.extras): item for item in map(Requirement, found.requires or [])}
    assert set(required) == {("comm-core",), ("torch",), ("comm-core", "testing")}
    assert comm.__version__ in required["comm-core",].specifier
    assert str(required["comm-core", "testing"].marker) == 'extra == "test"'


def test_it_passes_the_check(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with only(site):
        assert cli.main(["check", NAME]) == 0
    assert "no faults found" in capsys.readouterr().out


def sums() -> dict[str, Any]:
    rank = dist.get_rank()
    backend = comm.get_backend()
    x = torch.full((1000,), float(rank + 1))
    out = torch.empty_like(x)
    returned = backend.all_reduce(x)
    facts = {
        "name": backend.name,
        "route": backend.decision.route("all_reduce", "eager", "cpu", "float32").backend_for(x.nbytes),
        "sum": returned.unique().tolist(),
        "input": x.unique().tolist(),
        "into out": backend.all_reduce(x, out=out) is out and torch.equal(out, returned),
        "in place": backend.all_reduce(x, out=x) is x and torch.equal(x, returned),
    }
    comm.close()
    return facts


def test_two_ranks_choose_it_and_sum(site: Path, ranks: Ranks) -> None:
    for rank, facts in enumerate(ranks.run(sums, world_size=2, path=[[site]] * 2)):
        assert facts == {
            "name": NAME,
            "route": NAME,
            "sum": [3.0],
            "input": [rank + 1.0],
            "into out": True,
            "in place": True,
        }


def test_the_next_steps_name_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "ring"]) == 0
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["comm-plugin-ring"]
    steps = ["cd comm-plugin-ring", "pip install -e '.[test]'", "comm-core doctor", "comm-core check ring"]
    assert [step for step in [*steps, "comm-core demo", "pytest"] if f"\n  {step}" not in out] == []


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["new", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["Ring", "2ring", "my-ring", "_ring", "", "../ring", "torch_distributed", "r" * 65])
def test_a_name_that_no_backend_can_have(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no backend can have the name" in refused(capsys, name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists; nothing was written" in refused(capsys, "ring", "--folder", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["new", "ring", "--folder", str(tmp_path / "file" / "ring")]) == 1
    assert "the project can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("running", "accepted"),
    [
        ("0.1.0", ">=0.1,<0.2"),
        ("0.1.7", ">=0.1,<0.2"),
        ("0.9.0.dev3", ">=0.9.0.dev3,<0.10"),
        ("1.2.3", ">=1.2,<2"),
        ("2.0.0rc1+local", ">=2.0.0rc1,<3"),
    ],
)
def test_the_releases_of_core_that_it_accepts(running: str, accepted: str) -> None:
    assert new._compatible(running) == accepted
