"""Subcommands that other distributions add to `comm-core`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import comm_core as comm
import pytest
from comm_core import cli
from comm_core._plugins import installed
from comm_core.command import GROUP, contention

GREET = """
import sys

def add_parser(subparsers):
    parser = subparsers.add_parser("greet", help="only seen once it is imported")
    parser.add_argument("--status", type=int, default=0)
    parser.set_defaults(run=run)

def run(args):
    print("hello", args.arguments)
    return args.status
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path, and the only one in which distributions are looked for."""
    metadata = installed.metadata
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        installed,
        "metadata",
        SimpleNamespace(distributions=lambda **kwargs: metadata.distributions(path=[str(tmp_path)], **kwargs)),
    )
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def install(
    folder: Path, name: str, value: str, source: str | None = None, *, distribution: str = "", requires: str = ""
) -> None:
    """Lay out a distribution with one command, as pip would."""
    distribution = distribution or f"dist-{name}"
    info = folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\nSummary: 100% of what {name} does\n"
        + (f"Requires-Dist: {requires}\n" if requires else "")
    )
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")
    if source is not None:
        (folder / f"{value.partition(':')[0]}.py").write_text(source)


def refused(*arguments: str) -> None:
    """Run what ends as a usage error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def shown_help(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    return " ".join(out.split()), err


def test_a_third_partys_command_runs_with_its_arguments_and_its_status(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(folder, "greet", "third_party_greet", GREET)
    assert cli.main(["greet"]) == 0
    assert cli.main(["greet", "--status", "1"]) == 1
    assert capsys.readouterr() == ("hello ['greet']\nhello ['greet', '--status', '1']\n", "")
    refused("greet", "--nothing")
    out, err = capsys.readouterr()
    assert (out, "--nothing" in err) == ("", True)


def test_the_version_and_the_help_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"comm-core {comm.__version__}\n")
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: comm-core")


def test_one_rank_prints_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        refused("demo", "--nothing")
        assert bool(capsys.readouterr().err) == lines


@pytest.mark.parametrize(
    ("cores", "load", "ranks", "text"),
    [
        (2, 0.3, 2, ""),
        (8, 3.0, 4, ""),
        (2, 1.5, 2, "this machine is busy: a load of 1.5 on 2 processors, without the 2 ranks"),
        (2, 0.0, 3, "3 ranks share 2 processors, and wait for each other's turns"),
        (1, 0.0, 2, "2 ranks share 1 processor, and wait for each other's turns"),
    ],
)
def test_ranks_without_processors_of_their_own_are_told(
    monkeypatch: pytest.MonkeyPatch, cores: int, load: float, ranks: int, text: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert contention(ranks) == text


def test_an_object_can_be_a_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"{GREET}\nclass Greet:\n    add_parser = staticmethod(add_parser)\n"
    install(folder, "greet", "third_party_object:Greet", source)
    assert cli.main(["greet"]) == 0
    assert capsys.readouterr().out == "hello ['greet']\n"


def test_commands_are_listed_by_their_summary_and_not_imported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(folder, "greet", "third_party_listed", GREET)
    install(folder, "broken", "third_party_unlisted", "raise RuntimeError('no driver')")
    out, err = shown_help(capsys)
    assert err == ""
    assert "greet 100% of what greet does" in out
    assert "broken 100% of what broken does" in out
    assert all(name in out for name in ("check", "demo", "doctor", "explain", "new"))
    assert cli.main(["doctor"]) in (0, 1)
    assert not {"third_party_listed", "third_party_unlisted"} & set(sys.modules)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no driver')", "RuntimeError: no driver. See the traceback: python -c 'import "),
        ("import a_module_that_nobody_has", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("", "has no attribute 'add_parser'"),
        ("def add_parser(subparsers): 1 / 0", "ZeroDivisionError: division by zero"),
        ("def add_parser(subparsers): pass", "its add_parser must add a parser 'broken'"),
        ("def add_parser(subparsers): subparsers.add_parser('broken')", "with set_defaults(run=function)"),
    ],
)
def test_a_broken_command_says_so_by_name_and_stops_no_other(
    source: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = folder.name  # another one in each test
    install(folder, "broken", module, source)
    install(folder, "greet", f"{module}_greet", GREET)
    assert cli.main(["broken"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("comm-core: the command 'broken' of dist-broken 1.5 can't be used: ")
    assert said in line
    assert cli.main(["greet"]) == 0
    out, err = shown_help(capsys)
    assert ("broken" in out, err) == (True, "")


def test_a_command_of_another_release_of_core_is_refused_unimported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(folder, "greet", "third_party_newer", GREET, requires="comm-core>=1000")
    assert cli.main(["greet"]) == 1
    assert "it requires 'comm-core>=1000', and comm-core " in capsys.readouterr().err
    assert "third_party_newer" not in sys.modules


def test_a_command_that_two_distributions_register_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(folder, "greet", "third_party_one", GREET, distribution="one")
    install(folder, "greet", "third_party_two", GREET, distribution="two")
    assert cli.main(["greet"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "the name is registered 2 times, by one (third_party_one) and by two (third_party_two)" in err
    assert "greet can't be used: the name is registered 2 times" in shown_help(capsys)[0]


def test_comm_cores_own_command_wins_with_one_warning(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder, "demo", "third_party_demo", "raise RuntimeError('no driver')")
    refused("demo", "--nproc", "0")
    _, err = capsys.readouterr()
    warning, *rest = err.splitlines()
    assert warning == "comm-core: the command 'demo' of dist-demo 1.5 isn't used: comm-core has one of that name"
    assert "start at least two" in rest[-1]
    assert "isn't used" not in "\n".join(rest)
    # The ranks of a job say nothing: who started it has.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert shown_help(capsys)[1] == ""


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "-b", "8K"], ["bench", "--help"]])
def test_bench_without_its_distribution_says_what_to_install(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(folder.iterdir()) == []
    refused(*arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "comm-core: error: 'bench' isn't installed: pip install comm-bench"
    assert "bench not installed: pip install comm-bench" in shown_help(capsys)[0]


def test_an_unknown_command_is_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused("nothing")
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_doctor_runs_where_no_command_can_be_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def list_installed(group: str) -> None:
        raise OSError(f"{group}: the disk is gone")

    monkeypatch.setattr(installed, "list_installed", list_installed)
    assert cli.main(["doctor", "--json"]) in (0, 1)
    out, err = capsys.readouterr()
    assert out.startswith("{")
    (line,) = [line for line in err.splitlines() if line.startswith("comm-core:")]
    assert line.endswith("can't be listed: OSError: comm_core.commands: the disk is gone")


def test_its_help_imports_no_torch() -> None:
    code = """
import sys
from comm_core import cli
try:
    cli.main(["--help"])
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
