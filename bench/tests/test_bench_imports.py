"""The benchmark's imports from core."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import comm_bench

ALLOWED = {
    "comm_core",
    "comm_core.command",
    "comm_core.eligibility",  # whether the limits' buffers cross hosts
    "comm_core.env",
    "comm_core.fallback",  # the terminal contender calls it without a handle
    "comm_core.kernels",
    "comm_core.memory",
    "comm_core.topology",
    "comm_core.tuned",  # the table that `tune` writes
    "comm_core.tuning",
    "comm_core.types",
}


def modules_of_core(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "comm_core")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "comm_core":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if node.module == "comm_core" and importlib.util.find_spec(name) else node.module


def test_it_imports_only_these_modules() -> None:
    files = list(Path(comm_bench.__file__).parent.glob("*.py"))
    assert len(files) > 10
    found = {name for file in files for name in modules_of_core(file.read_text(encoding="utf-8"))}
    assert found == ALLOWED
