"""What `comm-core check` says about a plugin: sound ones, and one with each kind of fault."""

from __future__ import annotations

import functools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from broken_backends import BROKEN, source_of
from checked import answers_in
from comm_core import cli
from comm_core._plugins import discovery, installed
from comm_core._testing import quick
from comm_core._topologies import load_topologies
from harness import Ranks, install

HEAD = """\
import itertools
import comm_core as comm

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        raise NotImplementedError
"""

Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Check]:
    """A function that installs the one backend `mine`, with more hooks than all_reduce; the status and the text."""
    metadata, folder = installed.metadata, tmp_path / "site"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(
        installed,
        "metadata",
        SimpleNamespace(distributions=lambda **kwargs: metadata.distributions(path=[str(folder)], **kwargs)),
    )

    def run(hooks: str, *arguments: str) -> tuple[int, str]:
        install(folder, "mine", f"{HEAD}\n{textwrap.indent(textwrap.dedent(hooks), '    ')}\nplugin = Plugin()\n")
        status = cli.main(["check", "mine", *arguments])
        return status, capsys.readouterr().out

    discovery.reset()
    yield run
    discovery.reset()
    sys.modules.pop("mine", None)


def place(text: str, folder: Path) -> str:
    """The source line that the text points to."""
    (path, line) = next(line for line in text.splitlines() if line.startswith("   at "))[6:].rsplit(":", 1)
    assert Path(path) == folder / "site" / "mine.py"
    return Path(path).read_text().splitlines()[int(line) - 1 : int(line) + 1][-1].strip()


def test_a_sound_plugin_has_no_fault_and_its_answers_are_shown(check: Check) -> None:
    status, text = check("""
        @comm.hookimpl
        def probe(self):
            return {"version": [1, 2]}

        @comm.hookimpl
        def is_available(self, topology):
            for info in topology.ranks:
                assert info.facts["mine"] == {"version": [1, 2]}
                assert info.plugins["mine"] == "1.0"
            if not topology.one_host:
                return comm.Unavailable("it needs all ranks on one host")
            return comm.Available(7, ranges=(comm.Range("all_reduce", max_nbytes=64),))
    """)
    assert (status, text.splitlines()[0]) == (0, "backend 'mine' (mine 1.0): no faults found")
    assert answers_in(text) == {
        name: "yes, priority 7" if topology.one_host else "no: it needs all ranks on one host"
        for name, topology in load_topologies().items()
    }
    assert max(map(len, text.splitlines())) <= 80


def test_a_plugin_with_the_one_required_hook_is_sound(check: Check) -> None:
    assert check("") == (0, "backend 'mine' (mine 1.0): no faults found\n")


def test_an_import_that_raises(check: Check) -> None:
    status, text = check("raise RuntimeError('no such library')")
    assert status == 1
    assert "backend 'mine' (mine 1.0): 1 fault found" in text
    assert "1. its import raised RuntimeError: no such library" in text
    assert "python -c 'import mine'" in text


FAULTS = {
    "signature": (
        """
        @comm.hookimpl
        def is_available(self, group):
            return comm.Available(1)
        """,
        "is_available(group) lacks topology",
        "Write def is_available(topology)",
    ),
    "raising probe": (
        """
        @comm.hookimpl
        def probe(self):
            raise SystemExit("no driver")
        """,
        "probe raised",
        "return the reason as a fact",
    ),
    "large probe": (
        """
        @comm.hookimpl
        def probe(self):
            return {"log": "x" * 600}
        """,
        "the facts of probe can't be sent: ValueError: expected a JSON object of at most 512 bytes",
        "Return few and short facts",
    ),
    "probe that isn't JSON": (
        """
        @comm.hookimpl
        def probe(self):
            return {"class": Plugin}
        """,
        "the facts of probe can't be sent: TypeError",
        "Return few and short facts",
    ),
    "raising is_available": (
        """
        @comm.hookimpl
        def is_available(self, topology):
            return comm.Available(topology.ranks[1].global_rank)
        """,
        "is_available raised IndexError: tuple index out of range (topologies: cpus-1-rank)",
        "Let it return comm_core.Unavailable with the reason",
    ),
    "two answers": (
        """
        calls = itertools.count(1)

        @comm.hookimpl
        def is_available(self, topology):
            return comm.Available(next(self.calls))
        """,
        "is_available gave two answers about one topology (topologies: all)",
        "Decide from the argument `topology` alone",
    ),
    "impossible range": (
        """
        @comm.hookimpl
        def is_available(self, topology):
            return comm.Available(1, ranges=(comm.Range("all_reduce", min_nbytes=64, max_nbytes=32),))
        """,
        "is_available raised ValueError: max_nbytes=32",
        "Let it return comm_core.Unavailable with the reason",
    ),
    "range of a missing hook": (
        """
        @comm.hookimpl
        def is_available(self, topology):
            return comm.Available(1, ranges=(comm.Range("all_reduce_add_rms_norm"),))
        """,
        "is_available names ranges of all_reduce_add_rms_norm, which the plugin doesn't implement",
        "Return only ranges that the plugin's hooks can serve",
    ),
    "no answer": (
        """
        @comm.hookimpl
        def is_available(self, topology):
            topology.ranks[0].facts.clear()
        """,
        "is_available returned NoneType, neither Available nor Unavailable",
        "Return comm_core.Available or comm_core.Unavailable",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_remedy_and_its_place(fault: str, check: Check, tmp_path: Path) -> None:
    hooks, what, remedy = FAULTS[fault]
    status, text = check(hooks)
    assert status == 1
    assert "backend 'mine' (mine 1.0): 1 fault found" in text
    assert f"1. {what}" in text
    assert remedy in text
    assert place(text, tmp_path).startswith("def probe" if "probe" in what else "def is_available")


def test_a_hook_that_hangs_is_asked_once(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMM_CORE_CONTROL_TIMEOUT_S", "1")
    status, text = check("""
        import threading

        @comm.hookimpl
        def is_available(self, topology):
            self.threading.Event().wait(60)
    """)
    assert status == 1
    assert "TimeoutError" in text
    assert "(topologies: cpus-one-host)" in text


def test_a_backend_that_isnt_installed(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    check("")
    assert cli.main(["check", "mime"]) == 1
    text = capsys.readouterr().out
    assert "no installed distribution has a backend 'mime'" in text
    assert "installed are: mine" in text
    assert "Did you mean mine?" in text


def test_the_quick_tests_run_on_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A failed test would end the processes, and new ones would import torch.
    monkeypatch.setattr(quick, "Ranks", functools.partial(Ranks, lasting=True))
    # The ranks' processes get this process's path, and find the backend by its metadata.
    monkeypatch.syspath_prepend(str(install(tmp_path / "site", "broken", source_of(BROKEN["changes_its_input"]))))
    discovery.reset()
    try:
        assert cli.main(["check", "broken", "--ranks", "2"]) == 1
    finally:
        discovery.reset()
    outcomes = re.findall(r"^ *(passed|failed|skipped)  ([^:\n]*)", capsys.readouterr().out, re.MULTILINE)
    assert [name for outcome, name in outcomes if outcome == "failed"] == ["inputs are kept and only outputs written"]
    assert len([name for outcome, name in outcomes if outcome == "passed"]) == len(outcomes) - 1 > 5


def test_a_group_of_one_has_no_quick_tests(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check("", "--ranks", "1")
    assert ended.value.code == 2
    assert "expected at least 2" in capsys.readouterr().err


def test_a_setting_that_cannot_be_read_is_a_usage_error(
    check: Check, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMM_CORE_CONTROL_TIMEOUT_S", "soon")
    with pytest.raises(SystemExit) as ended:
        check("")
    assert ended.value.code == 2
    assert "COMM_CORE_CONTROL_TIMEOUT_S" in capsys.readouterr().err
