"""What a plugin's hooks may look like, and what its author reads where they don't."""

from __future__ import annotations

import textwrap
from types import ModuleType, SimpleNamespace
from typing import Any

import pluggy
import pytest
from comm_core import hookspecs
from comm_core._plugins import discovery
from comm_core._plugins.validation import HOOKS
from comm_core.errors import PluginLoadError

HEADER = """
import contextlib, functools
import pluggy
from comm_core import hookimpl

COMM_HOOK_API = (1, 0)
"""
ALL_REDUCE = """
@hookimpl
def all_reduce(session, tensor, out):
    return tensor
"""

BACKEND = "class Backend:\n    COMM_HOOK_API = (1, 0)\n"
DECORATED = """
def keep(function):
    @functools.wraps(function)
    def kept(*args, **kwargs):
        return function(*args, **kwargs)
    return kept

@hookimpl
@keep
def all_reduce(session, tensor, out):
    return tensor
"""
LAZY = """
def __getattr__(name):
    raise RuntimeError('never asked')

def __dir__():
    return ['all_reduce', 'lazy']
"""


def module(source: str) -> ModuleType:
    plugin = ModuleType("plugin")
    exec(compile(textwrap.dedent(source), "plugin.py", "exec"), vars(plugin))  # noqa: S102 - this file's own text
    return plugin


def refusal(source: str) -> str:
    with pytest.raises(PluginLoadError) as caught:
        discovery.load_object("mine", module(source), "1.0", "plugin-mine")
    text = str(caught.value)
    assert text.startswith("plugin 'mine' (plugin-mine 1.0) isn't used: ")
    return text


def through_pluggy(plugin: discovery.Plugin) -> Any:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(SimpleNamespace(**plugin.hooks))
    return manager.hook


def test_pluggy_reads_the_same_specs() -> None:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    read = {
        name: tuple(caller.spec.argnames) for name, caller in vars(manager.hook).items() if not name.startswith("_")
    }
    assert read == dict(HOOKS)


def test_every_hook_can_be_implemented_and_called_both_ways() -> None:
    source = HEADER + "".join(
        f"@hookimpl\ndef {name}({', '.join(parameters)}):\n    return ({', '.join(parameters)},)\n"
        for name, parameters in HOOKS.items()
        if parameters
    )
    plugin = discovery.load_object("mine", module(source + "@hookimpl\ndef probe():\n    return ()\n"))
    assert set(plugin.hooks) == set(HOOKS)
    for name, parameters in HOOKS.items():
        assert plugin.has(name)
        assert plugin.hooks[name](*parameters) == parameters
        assert getattr(through_pluggy(plugin), name)(**dict(zip(parameters, parameters, strict=True))) == parameters


@pytest.mark.parametrize(
    "source",
    [
        ALL_REDUCE + "@hookimpl\n@contextlib.contextmanager\ndef capture_ctx(session):\n    yield\n",
        ALL_REDUCE + "connect = None\n",
        ALL_REDUCE + "import json as probe\n",
        ALL_REDUCE + "def helper(x, *args, y=1): pass\n",
        "@hookimpl(specname='all_reduce')\ndef fast(session, tensor, out):\n    return tensor\n",
        "@hookimpl(tryfirst=True)\ndef all_reduce(session, tensor, out, /):\n    return tensor\n",
        DECORATED,
        ALL_REDUCE + LAZY,
    ],
    ids=["context manager", "None", "module", "helper", "specname", "positional-only", "wraps", "lazy attributes"],
)
def test_what_is_allowed(source: str) -> None:
    plugin = discovery.load_object("mine", module(HEADER + source))
    assert plugin.hooks["all_reduce"](None, 7, None) == 7
    assert through_pluggy(plugin).all_reduce(session=None, tensor=7, out=None) == 7


def test_properties_are_not_evaluated() -> None:
    class Backend:
        COMM_HOOK_API = (1, 0)

        @property
        def communicator(self) -> None:
            raise AssertionError("evaluated")

        all_reduce = staticmethod(module(HEADER + ALL_REDUCE).all_reduce)

    assert discovery.load_object("mine", Backend()).has("all_reduce")


@pytest.mark.parametrize(
    ("version", "parts"),
    [
        (None, ["it has no COMM_HOOK_API", "Set COMM_HOOK_API = (1, 0)"]),
        ("'1.0'", ["its COMM_HOOK_API is '1.0', not a tuple of two integers", "Set COMM_HOOK_API = (1, 0)"]),
        ("[1, 0]", ["not a tuple of two integers"]),
        ("(1, True)", ["not a tuple of two integers"]),
        ("(1, 0, 0)", ["not a tuple of two integers"]),
        ("(2, 0)", ["written for version 2.0", "has 1.0", "Install a release of the plugin for version 1"]),
        ("(0, 9)", ["written for version 0.9"]),
        ("(1, 1)", ["needs version 1.1", "pip install --upgrade comm-core"]),
    ],
)
def test_the_version_of_the_hooks(version: str | None, parts: list[str]) -> None:
    line = "" if version is None else f"COMM_HOOK_API = {version}"
    text = refusal(HEADER.replace("COMM_HOOK_API = (1, 0)", line) + ALL_REDUCE)
    for part in parts:
        assert part in text


def test_an_older_minor_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hookspecs, "API", (1, 3))
    assert discovery.load_object("mine", module(HEADER + ALL_REDUCE)).has("all_reduce")


REFUSED = {
    "no hooks": ("", ["no hooks at all", "@comm_core.hookimpl above def all_reduce(session, tensor, out)"]),
    "required": (
        "@hookimpl\ndef close(session, orderly): pass\n",
        ["all_reduce is missing", "Implement def all_reduce(session, tensor, out)"],
    ),
    "misspelt": (
        ALL_REDUCE + "@hookimpl\ndef is_avaliable(topology): pass\n",
        ["there is no hook is_avaliable; did you mean is_available?", "Rename is_avaliable"],
    ),
    "unknown": (
        ALL_REDUCE + "@hookimpl\ndef broadcast(session): pass\n",
        ["there is no hook broadcast", "the hooks are"],
    ),
    "misspelt specname": (
        "@hookimpl(specname='allreduce')\ndef all_reduce(session, tensor, out): pass\n",
        ["there is no hook allreduce; did you mean all_reduce?"],
    ),
    "unmarked": (
        ALL_REDUCE + "def connect(topology, context): pass\n",
        ["connect has a hook's name but isn't marked", "@comm_core.hookimpl above def connect"],
    ),
    "unmarked alone": (
        "def all_reduce(session, tensor, out): pass\n",
        ["all_reduce has a hook's name but isn't marked"],
    ),
    "another project's marker": (
        "@pluggy.HookimplMarker('comm')\ndef all_reduce(session, tensor, out): pass\n",
        ["all_reduce has a hook's name but isn't marked"],
    ),
    "no function": (
        ALL_REDUCE + "check = functools.partial(print)\n",
        ["check has a hook's name but is a partial, not a function", "Write def check(session)"],
    ),
    "marker above staticmethod": (
        BACKEND + "    @hookimpl\n    @staticmethod\n    def all_reduce(session, tensor, out): pass\n",
        ["isn't marked", "below @staticmethod"],
    ),
    "two for one": (
        ALL_REDUCE + "@hookimpl(specname='all_reduce')\ndef other(session, tensor, out): pass\n",
        ["two functions implement all_reduce"],
    ),
    "renamed": (
        "@hookimpl\ndef all_reduce(session, x, out): pass\n",
        [
            "all_reduce(session, x, out) lacks tensor, has x, which the spec doesn't",
            "Write def all_reduce(session, tensor, out)",
        ],
    ),
    "order": (
        "@hookimpl\ndef all_reduce(session, out, tensor): pass\n",
        [
            "all_reduce(session, out, tensor) has the parameters in another order",
            "Write def all_reduce(session, tensor, out)",
        ],
    ),
    "missing": ("@hookimpl\ndef all_reduce(session, tensor): pass\n", ["lacks out"]),
    "surplus": (
        "@hookimpl\ndef all_reduce(session, tensor, out, stream): pass\n",
        ["has stream, which the spec doesn't"],
    ),
    "default": (
        "@hookimpl\ndef all_reduce(session, tensor, out=None): pass\n",
        ["(session, tensor, out=None) has defaults"],
    ),
    "keyword-only": ("@hookimpl\ndef all_reduce(session, tensor, *, out): pass\n", ["has keyword-only parameters"]),
    "*args": (
        "@hookimpl\ndef all_reduce(*args): pass\n",
        ["all_reduce(*args) takes variable positional", "lacks session"],
    ),
    "**kwargs": (
        "@hookimpl\ndef all_reduce(session, tensor, out, **more): pass\n",
        ["takes variable keyword arguments"],
    ),
    "wrapper": (
        "@hookimpl(wrapper=True)\ndef all_reduce(session, tensor, out):\n    return (yield)\n",
        ["is a wrapper"],
    ),
    "old wrapper": (
        "@hookimpl(hookwrapper=True)\ndef all_reduce(session, tensor, out):\n    yield\n",
        ["is a wrapper"],
    ),
    "optional": (
        "@hookimpl(optionalhook=True)\ndef all_reduce(session, tensor, out): pass\n",
        ["marked optionalhook=True", "plain @comm_core.hookimpl"],
    ),
    "async": ("@hookimpl\nasync def all_reduce(session, tensor, out): pass\n", ["all_reduce is async"]),
    "async generator": ("@hookimpl\nasync def all_reduce(session, tensor, out):\n    yield\n", ["all_reduce is async"]),
    "generator": (
        "@hookimpl\ndef all_reduce(session, tensor, out):\n    yield\n",
        ["all_reduce is a generator function"],
    ),
    "bare capture_ctx": (
        ALL_REDUCE + "@hookimpl\ndef capture_ctx(session):\n    yield\n",
        ["capture_ctx is a generator function", "@contextlib.contextmanager between"],
    ),
    "a class": (
        BACKEND + "    @hookimpl\n    def all_reduce(self, session, tensor, out): pass\n",
        ["has self, which the spec doesn't", "let it name an instance"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    source, parts = REFUSED[case]
    if source.startswith(BACKEND):
        with pytest.raises(PluginLoadError) as caught:
            discovery.load_object("mine", module(HEADER + source).Backend)
        text = str(caught.value)
    else:
        text = refusal(HEADER + source)
    for part in parts:
        assert part in text


def test_a_signature_that_pluggy_reads_otherwise_is_refused() -> None:
    source = """
        import inspect
        @hookimpl
        def all_reduce(*args): pass
        def spec(session, tensor, out): pass
        all_reduce.__signature__ = inspect.signature(spec)
        del spec
    """
    plugin = module(HEADER + textwrap.dedent(source))
    try:
        found = discovery.load_object("mine", plugin)
    except PluginLoadError as error:
        assert "pluggy reads the parameters of all_reduce as ()" in str(error)  # noqa: PT017 - depends on pluggy's version
    else:
        assert found.manager.hook.all_reduce.get_hookimpls()[0].argnames == ("session", "tensor", "out")


def test_all_faults_are_reported_at_once() -> None:
    text = refusal(
        HEADER + "@hookimpl\ndef all_reduce(session, out, tensor): pass\n@hookimpl\ndef chekc(session): pass\n"
    )
    assert "another order" in text
    assert "did you mean check?" in text


@pytest.mark.parametrize("pair", [("suspend", "resume"), ("variants", "use_variants")])
def test_a_plugin_has_both_hooks_of_a_pair_or_neither(pair: tuple[str, str]) -> None:
    for one, other in (pair, pair[::-1]):
        text = refusal(HEADER + ALL_REDUCE + f"@hookimpl\ndef {one}({', '.join(HOOKS[one])}):\n    pass\n")
        assert f"it has {one} but not {other}. " in text
        assert f"Implement def {other}({', '.join(HOOKS[other])}) too, or neither." in text
