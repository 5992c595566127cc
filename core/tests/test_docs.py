"""The pages name everything that exists, and nothing that doesn't."""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
import re
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import comm_core
import torch
from comm_core import errors, hookspecs
from comm_core._memory.cpu import CpuMemory
from comm_core._plugins import discovery
from comm_core._plugins.validation import HOOKS
from comm_core.env import PREFIX, Settings
from test_memory import on_ranks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINE_CHARS = 120


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """The tables' rows by the code in their first cell."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in cells}


def generated() -> list[str]:
    """The objects that the reference documents, by their full names."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def site() -> ModuleType:
    """The part of the site's build that is ours."""
    spec = importlib.util.spec_from_file_location("_site", DOCS / "_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_hook_is_in_the_reference_and_has_a_row() -> None:
    assert "comm_core.hookspecs" in generated()
    assert all(hasattr(hookspecs, name) for name in HOOKS)
    assert set(rows(page("hooks.md"))) == set(HOOKS)


def test_the_plugin_that_is_shown_loads() -> None:
    blocks = re.findall(r"^```python\n(.+?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (source,) = [block for block in blocks if "hookimpl" in block]
    plugin = ModuleType("comm_plugin_mine")
    exec(source, vars(plugin))  # noqa: S102 - the page's own text
    assert discovery.load_object("mine", plugin).has("all_reduce")


def test_the_backend_with_shared_memory_that_is_shown_sums_also_after_a_sleep() -> None:
    blocks = re.findall(r"^```python\n(.+?)^```$", page("kernels.md"), re.MULTILINE | re.DOTALL)
    (source,) = [block for block in blocks if "memory.share" in block]
    plugin = ModuleType("comm_plugin_mine")
    exec(source, vars(plugin))  # noqa: S102 - the page's own text
    hooks = discovery.load_object("mine", plugin).hooks
    both = threading.Barrier(2)

    class Native:
        """Stands for the kernel: stores the message behind the flags of the rank's buffer, and reads all buffers."""

        def all_reduce(self, tensor: torch.Tensor, out: torch.Tensor, addresses: list[int], rank: int) -> None:
            slots = [CpuMemory().view(address + plugin.FLAGS_NBYTES, tensor.nbytes) for address in addresses]
            assert not slots[rank].any(), "the buffer's first contents"
            slots[rank].view(tensor.dtype).copy_(tensor)
            both.wait(60)
            out.copy_(sum(slot.view(tensor.dtype) for slot in slots))  # type: ignore[arg-type]
            both.wait(60)

    def work(context: comm_core.GroupContext) -> None:
        session = hooks["connect"](None, context)
        x = torch.full((5,), 1.0 + context.rank)
        assert hooks["all_reduce"](session, x, None).tolist() == [3.0] * 5
        hooks["suspend"](session)
        context.control.barrier()
        hooks["resume"](session)
        assert hooks["all_reduce"](session, x, x).tolist() == [3.0] * 5
        hooks["close"](session, True)

    vars(plugin)["LIBRARY"] = SimpleNamespace(load=Native)
    assert on_ranks(2, work) == [None] * 2


def test_every_hook_says_in_the_specs_when_it_may_fail_and_what_then() -> None:
    assert HOOKS
    for name in HOOKS:
        doc = getattr(hookspecs, name).__doc__
        assert "Raises:" in doc, name
        assert any(word in doc for word in ("Local", "Collective", "hot path", "Hot path")), name


def test_every_environment_variable_has_a_row_with_its_default() -> None:
    module = site()
    text = module.on_page_markdown(page("env.md"))
    assert text != page("env.md")
    table = rows(text)
    assert list(table) == list(Settings.variables())
    assert [name for name, (default, _) in table.items() if not default] == []
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


def test_every_error_is_in_the_reference_and_exported() -> None:
    assert "comm_core.errors" in generated()
    assert all(getattr(errors, name).__doc__ for name in errors.__all__)
    assert set(errors.__all__) <= set(comm_core.__all__)


def test_every_public_name_is_in_the_reference() -> None:
    documented = generated()
    assert len(documented) == len(set(documented))
    assert all(pkgutil.resolve_name(name) for name in documented)
    public = {name: getattr(comm_core, name) for name in comm_core.__all__ if name != "__version__"}
    assert public
    for name, value in public.items():
        home = getattr(value, "__module__", "")
        assert f"comm_core.{name}" in documented or home in documented or hasattr(hookspecs, name), name


def test_every_public_module_has_a_page_of_the_reference() -> None:
    public = {module.name for module in pkgutil.iter_modules(comm_core.__path__) if not module.name.startswith("_")}
    assert {"hookspecs", "kernels"} < public
    # `cli` is the command, which docs/cli.md describes.
    assert {f"comm_core.{name}" for name in public - {"cli"}} <= set(generated())


def test_every_line_of_prose_fits() -> None:
    paths = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]
    assert {ROOT / "README.md", DOCS / "hooks.md"} <= set(paths)
    for path in paths:
        # Code stands as it is, and a row of a table can't be broken.
        prose = re.sub(r"^ *```.*?^ *```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        lines = [line for line in prose.splitlines() if len(line) > LINE_CHARS and not line.startswith("|")]
        assert lines == [], path
