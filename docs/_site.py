"""Gives MkDocs its pages from the whole repository; `mkdocs.yml` says why."""  # noqa: INP001 - MkDocs loads it by path

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comm_core.env import Settings

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
#: Files that pages link to or show, and that aren't pages.
ASSETS = ["LICENSE", "benchmarks/*.svg", "benchmarks/*_step.py", "benchmarks/*_step.json"]
#: In docs/env.md: what a reader of the repository sees in the place of the table.
VARIABLES = "`core/src/comm_core/env.py` lists the variables with their meanings; `make docs` puts a table here."


def on_config(config: MkDocsConfig) -> None:
    """Replace the patterns in `nav` by the files that match them."""
    nav: list[Any] = []
    for item in config.nav or []:
        if isinstance(item, dict):
            nav += [{title: _matches(patterns)} for title, patterns in item.items()]
        else:
            nav.append(item)
    config.nav = nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace MkDocs' own pages: each file under its path in the repository."""
    # Here alone, so that a test reads the rest where MkDocs isn't installed.
    from mkdocs.structure.files import File, Files

    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = _matches(
        [
            *("*.md", "docs/**/*.md", "plugins/*/README.md", "integrations/*/README.md"),
            *("bench/README.md", "benchmarks/README.md", *ASSETS),
        ]
    )
    return Files([*theme, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths)])


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the table of variables where a page wants it."""
    return markdown.replace(VARIABLES, variables())


def variables() -> str:
    """A Markdown table of core's environment variables, their defaults and their meanings."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for field, (name, meaning) in zip(dataclasses.fields(Settings), Settings.variables().items(), strict=True):
        default = f"{field.default:g}" if isinstance(field.default, float) else field.default
        if isinstance(default, bool):
            default = int(default)
        if default in (None, (), ""):
            default = "unset"
        rows.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(rows)


def _matches(patterns: list[str]) -> list[str]:
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
