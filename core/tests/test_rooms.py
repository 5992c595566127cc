"""How core's modules know each other; `make lint` checks which way the arrows point."""

from __future__ import annotations

import ast
from pathlib import Path

import comm_core

FOLDER = Path(comm_core.__file__).parent
#: What a reader can hold in mind: more siblings than these say that a module has more than one role.
MOST_SIBLINGS = 9


def siblings(path: Path, modules: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or {node.module}
    return found & modules


def test_no_module_imports_many_siblings() -> None:
    paths = {
        ".".join(["comm_core", *path.relative_to(FOLDER).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in FOLDER.rglob("*.py")
    }
    counts = {name: len(siblings(path, set(paths))) for name, path in paths.items()}
    assert counts["comm_core._group.api"] > 3
    assert {name: count for name, count in counts.items() if count > MOST_SIBLINGS} == {}


def test_every_file_is_short() -> None:
    assert [path for path in FOLDER.rglob("*.*") if len(path.read_bytes().splitlines()) > 400] == []
