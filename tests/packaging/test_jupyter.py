"""Core works in a notebook beside Jupyter's packages `comm` and `ipykernel`."""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path

import pytest
from wheelhouse import ROOT, BuildWheel, Pip, Venv

# Jupyter's `comm` sends the sum of a group of one rank to the notebook's front end.
CELL = """
import comm
import comm_core
import torch

total = comm_core.get_backend().all_reduce(torch.ones(3))
comm.create_comm(target_name="sums", data={"sum": total.tolist()})
comm_core.close()
print(comm.__file__, comm_core.__file__)
"""

FRONT_END = """
import json, sys
from jupyter_client.manager import start_new_kernel

kernel, client = start_new_kernel(startup_timeout=200)
messages = []
try:
    reply = client.execute_interactive(sys.argv[1], allow_stdin=False, output_hook=messages.append, timeout=200)
finally:
    client.stop_channels()
    kernel.shutdown_kernel(now=True)
opened = [message["content"] for message in messages if message["msg_type"] == "comm_open"]
streams = [message["content"] for message in messages if message["msg_type"] == "stream"]
printed = "".join(one["text"] for one in streams if one["name"] == "stdout")
print(json.dumps([reply["content"], [[one["target_name"], one["data"]] for one in opened], printed]))
"""


@pytest.fixture(scope="module")
def jupyter(build_wheel: BuildWheel, pip: Pip, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """A venv with core, `comm` and `ipykernel`."""
    fresh = Venv(tmp_path_factory.mktemp("jupyter"), ["comm-core"])
    pip("--python", fresh.python, "install", "--no-compile", build_wheel(ROOT / "core"), "comm", "ipykernel")
    return fresh


def test_no_file_of_core_belongs_to_another_distribution(jupyter: Venv) -> None:
    owners: dict[str, list[str]] = defaultdict(list)
    for found in distributions(path=[str(jupyter.site_packages)]):
        name = found.metadata["Name"]
        for file in found.files or []:
            owners[os.path.normpath(str(found.locate_file(file)))].append(name)
    assert owners[str(jupyter.site_packages / "comm" / "__init__.py")] == ["comm"]
    assert [names for names in owners.values() if "comm-core" in names and len(names) > 1] == []


def test_a_notebook_uses_both(jupyter: Venv, clean_environ: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [jupyter.python, "-c", FRONT_END, CELL],
        cwd=tmp_path,
        env={**clean_environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reply, opened, printed = json.loads(done.stdout)
    assert reply["status"] == "ok", reply
    assert opened == [["sums", {"sum": [1.0, 1.0, 1.0]}]]
    assert printed.split() == [str(jupyter.site_packages / name / "__init__.py") for name in ("comm", "comm_core")]
