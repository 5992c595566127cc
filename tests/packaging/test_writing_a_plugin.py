"""The page docs/writing-a-plugin.md, done as it says: every command runs, and every Python block."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import comm_core as comm
import pytest
from comm_core._plugins import discovery
from wheelhouse import ROOT, BuildWheel, Venv, read_metadata

PAGE = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
# Each fenced block: its language and its text.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
AT_ITS_END = ", at its end"
ALL_REDUCE = """
@comm.hookimpl
def all_reduce(session, tensor, out): ...
"""


def file_of(text: str) -> str:
    """The comment in a block's first line: the file that it belongs to, with `AT_ITS_END` if it is added to it."""
    return text.splitlines()[0][2:] if text.startswith("# ") else ""


def script() -> str:
    """The page as one program: its commands, and before a command the files of the blocks above it."""
    lines = ["set -euo pipefail"]
    for language, text in BLOCKS:
        path = file_of(text)
        if language == "console":
            for line in text.splitlines():
                assert line.startswith("$ "), f"not a command: {line}"
                lines += [f"echo; echo {shlex.quote(f'{line} # after')} $SECONDS s", line[2:]]
        elif language == "python" and path.startswith(("src/", "tests/", "../")):
            added = path.endswith(AT_ITS_END)
            lines += [f"cat {'>>' if added else '>'} {path.removesuffix(AT_ITS_END)} <<'END'", f"\n{text}END"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def output(build_wheel: BuildWheel, clean_environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the commands print, run in a fresh folder.

    Nothing is fetched: pip takes core from a folder of wheels, and finds the other packages in the virtual environment,
    which exists before the page makes it. Commands of such a package, here pytest's, are missing there.
    """
    folder = tmp_path_factory.mktemp("page")
    core = build_wheel(ROOT / "core")
    linked = ["pytest", "hatchling", "editables", "apache-tvm-ffi", "numpy"]
    fresh = Venv(folder, [*(read_metadata(core).requires or []), *linked])
    commands = folder / "bin"
    commands.mkdir()
    (commands / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    (commands / "pytest").write_text(f'#!/bin/sh\nexec "{fresh.python}" -m pytest "$@"\n')
    (commands / "pytest").chmod(0o755)
    environ = {
        **clean_environ,
        "PATH": f"{commands}:{clean_environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(core.parent),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of "no isolation"
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        # Few of the kit's tests; other tests run all of it, for other backends.
        "PYTEST_ADDOPTS": "-k 'answers_validly or inputs_are_kept or two_groups'",
    }
    log = folder / "log"
    with log.open("w") as file:
        page = subprocess.Popen(
            ["bash", "-c", script()], cwd=folder, env=environ, stdout=file, stderr=file, start_new_session=True
        )
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = page.wait(timeout=280)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(page.pid, signal.SIGKILL)  # if a command hangs, what it started, too
        page.wait()
    text = log.read_text()
    assert status == 0, text
    return text


def after(output: str, command: str) -> list[str]:
    """What each run of a command printed."""
    head = rf"^\$ {re.escape(command)}.*? # after \d+ s\n"
    found = re.findall(rf"{head}(.*?)(?=^\$ |\Z)", output, re.MULTILINE | re.DOTALL)
    assert found, f"{command} isn't on the page"
    return found


def test_the_commands_of_the_page_lead_to_a_plugin_that_serves(output: str) -> None:
    (checked,) = after(output, "comm-core check thirdparty")
    assert "no faults found" in checked
    (tested,) = after(output, "pytest")
    assert "passed" in tested
    job = "python -m torch.distributed.run"
    for name, command in (("thirdparty", job), ("quick", f"COMM_CORE_BACKENDS=quick {job}")):
        (printed,) = after(output, command)
        assert printed.count(f"{name} sums ones to [2.0, 2.0, 2.0, 2.0]") == 2


def test_the_page_shows_the_written_test() -> None:
    (shown,) = (text for language, text in BLOCKS if language == "python" and file_of(text).startswith("tests/"))
    template = ROOT / "core" / "src" / "comm_core" / "_template" / "test.py.template"
    written = template.read_text().replace("${title}", "Thirdparty").replace("${name}", "thirdparty")
    assert written.split("\n\n", 1)[1] == shown.split("\n", 1)[1]


def test_the_other_python_on_the_page_is_valid() -> None:
    others = [text for language, text in BLOCKS if language == "python" and not file_of(text)]
    hooks, cases = ModuleType("hooks"), ModuleType("cases")
    vars(hooks).update(comm=comm, Session=object, COMM_HOOK_API=(1, 0))
    exec(ALL_REDUCE, vars(hooks))  # noqa: S102 - the text above
    for text in others:
        exec(text, vars(hooks if "@comm.hookimpl" in text else cases))  # noqa: S102 - the page's own text
    assert {"capture_ctx", "variants", "use_variants"} <= discovery.load_object("thirdparty", hooks).hooks.keys()
    assert vars(cases)["TestThirdparty"].backend == "thirdparty"
    assert len(others) == 3
