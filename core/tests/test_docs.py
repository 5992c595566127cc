"""The reference pages name everything that exists, and nothing that doesn't."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import ModuleType

import comm_core
from comm_core import discovery, errors
from comm_core._validation import HOOKS
from comm_core.env import PREFIX, Settings

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def headings(text: str) -> list[str]:
    """What has a section of its own: the code in headings of the second level."""
    return re.findall(r"^## `(.+)`$", text, re.MULTILINE)


def rows(text: str) -> dict[str, list[str]]:
    """The tables' rows by the code in their first cell."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_hook_has_a_section_with_its_signature_and_a_row() -> None:
    text = page("hooks.md")
    assert sorted(headings(text)) == sorted(f"{name}({', '.join(parameters)})" for name, parameters in HOOKS.items())
    assert set(rows(text)) == set(HOOKS)


def test_the_plugin_that_is_shown_loads() -> None:
    source = re.search(r"^```python\n(.+?)^```$", page("hooks.md"), re.MULTILINE | re.DOTALL)
    assert source is not None
    plugin = ModuleType("comm_plugin_mine")
    exec(source[1], vars(plugin))  # noqa: S102 - the page's own text
    assert discovery.load_object("mine", plugin).has("all_reduce")


def test_every_hook_says_in_the_specs_when_it_may_fail_and_what_then() -> None:
    assert HOOKS
    for name in HOOKS:
        doc = getattr(comm_core.hookspecs, name).__doc__
        assert "Raises:" in doc, name
        assert any(word in doc for word in ("Local", "Collective", "hot path", "Hot path")), name


def test_every_environment_variable_has_a_row_with_its_default() -> None:
    table = rows(page("env.md"))
    assert list(table) == list(Settings.variables())
    numbers = 0
    for field in dataclasses.fields(Settings):
        if isinstance(field.default, (int, float)):
            assert table[PREFIX + field.name.upper()][0] == str(int(field.default)), field.name
            numbers += 1
    assert numbers


def test_no_page_speaks_of_an_environment_variable_that_isnt_there() -> None:
    named = {
        match for path in DOCS.glob("*.md") for match in re.findall(rf"{PREFIX}[A-Z_]+\b", path.read_text("utf-8"))
    }
    assert named
    assert named <= set(Settings.variables())


def test_every_error_has_a_section_and_is_exported() -> None:
    assert sorted(headings(page("errors.md"))) == sorted(errors.__all__)
    assert set(errors.__all__) <= set(comm_core.__all__)
