"""Validate a plugin object against the hook specs, more strictly than pluggy.

pluggy lets an implementation omit arguments, reorder them or give them defaults, which it then never fills. Core calls
hooks by position, so each of these would pass the wrong tensor.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import pluggy

from comm_core import hookspecs
from comm_core._plugins.installed import PluginRejectedError

__all__ = ["HOOKS", "validate"]

_API = "COMM_HOOK_API"
_REQUIRED = "all_reduce"
_PAIRS = (("suspend", "resume"), ("variants", "use_variants"))

#: Functions with the options of their markers, by attribute name.
_Marked: TypeAlias = dict[str, tuple[Callable[..., Any], Mapping[str, Any]]]

#: The parameters of every hook, by the hook's name.
HOOKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: tuple(inspect.signature(spec).parameters)
        for name, spec in vars(hookspecs).items()
        if inspect.isfunction(spec) and spec.__module__ == hookspecs.__name__
    }
)


class _FunctionNamespace:
    """An object with only the functions of a plugin, for pluggy.

    pluggy 1.6 evaluates every attribute of a registered object, including properties and lazy imports; 1.7 doesn't.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        vars(self).update(functions)


class _Problem(NamedTuple):
    reason: str
    remedy: str


def validate(name: str, plugin: object, distribution: str | None = None) -> dict[str, Callable[..., Any]]:
    """Validate a plugin and register its hooks with a manager of its own.

    Args:
        name: the backend's name.
        plugin: a module, or an object with the hooks as attributes.
        distribution: its distribution's name, for remedies; None if unknown.

    Returns:
        The hooks as plain callables, by name.

    Raises:
        PluginRejectedError: the plugin breaks rules; the reason lists all faults of the first failing check.
    """
    _reject_if(_api_problems(plugin, distribution))
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    marked, unmarked = _functions(plugin, manager)
    _reject_if(_unmarked_problems(marked, unmarked))
    hooks: dict[str, Callable[..., Any]] = {}
    problems: list[_Problem] = []
    for attribute, (function, options) in marked.items():
        hook = options.get("specname") or attribute
        problems += _hook_problems(hook, attribute, function, options)
        if hook in hooks:
            problems.append(_Problem(f"two functions implement {hook}", f"Keep one implementation of {hook}."))
        hooks[hook] = function
    if _REQUIRED not in hooks:
        problems.append(_Problem(f"{_REQUIRED} is missing", f"Implement {_signature_text(_REQUIRED)}; it is required."))
    problems += _pair_problems(hooks)
    _reject_if(problems)
    try:
        manager.register(_FunctionNamespace(hooks), name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginRejectedError(f"pluggy refuses it: {error}", "Fix the fault that pluggy names.") from error
    _reject_if(_pluggy_mismatches(manager, hooks))
    return hooks


def _reject_if(problems: Iterator[_Problem] | list[_Problem]) -> None:
    found = list(problems)
    if found:
        remedies = dict.fromkeys(problem.remedy for problem in found)
        raise PluginRejectedError("; ".join(problem.reason for problem in found), " ".join(remedies))


def _api_problems(plugin: object, distribution: str | None) -> Iterator[_Problem]:
    value = getattr(plugin, _API, None)
    ours = ".".join(map(str, hookspecs.API))
    write = f"Set {_API} = {hookspecs.API} in the module or object that the entry point names."
    if value is None:
        yield _Problem(f"it has no {_API}", write)
    elif not isinstance(value, tuple) or [type(number) for number in value] != [int, int]:
        yield _Problem(f"its {_API} is {value!r}, not a tuple of two integers", write)
    elif value[0] != hookspecs.API[0]:
        yield _Problem(
            f"it is written for version {value[0]}.{value[1]} of the hooks; this comm-core has {ours}",
            f"Install a release of the plugin for version {hookspecs.API[0]}, or a comm-core with version {value[0]}"
            + (f": pip install --upgrade {distribution} comm-core" if distribution else "."),
        )
    elif value[1] > hookspecs.API[1]:
        yield _Problem(
            f"it needs version {value[0]}.{value[1]} of the hooks; this comm-core has {ours}",
            "Upgrade comm-core: pip install --upgrade comm-core",
        )


def _functions(plugin: object, manager: pluggy.PluginManager) -> tuple[_Marked, dict[str, object]]:
    """Return the marked functions with their markers' options, and the other callables that have a hook's name."""
    marked: _Marked = {}
    unmarked: dict[str, object] = {}
    for name in dir(plugin):
        static = inspect.getattr_static(plugin, name, None)
        # Other attributes aren't read: getattr would run properties, and a module's own __getattr__ may import.
        if not (inspect.isroutine(static) or isinstance(static, (staticmethod, classmethod))):
            if name in HOOKS and callable(static):
                unmarked[name] = static
            continue
        function = getattr(plugin, name)
        options = manager.parse_hookimpl_opts(_FunctionNamespace({name: function}), name)
        if options is not None:
            marked[name] = function, dict(options)
        elif name in HOOKS:
            unmarked[name] = function
    return marked, unmarked


def _unmarked_problems(marked: Mapping[str, object], unmarked: Mapping[str, object]) -> Iterator[_Problem]:
    for name, value in unmarked.items():
        if inspect.isroutine(value):
            yield _Problem(
                f"{name} has a hook's name but isn't marked as one",
                f"Write @comm_core.hookimpl above def {name}, below @staticmethod or @classmethod, or rename it.",
            )
        else:
            yield _Problem(
                f"{name} has a hook's name but is a {type(value).__name__}, not a function",
                f"Write {_signature_text(name)}, or rename it.",
            )
    if not marked and not unmarked:
        yield _Problem(
            "it has no hooks at all",
            f"Let the entry point name a module or object with @comm_core.hookimpl above {_signature_text(_REQUIRED)}.",
        )


def _hook_problems(
    hook: str, attribute: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> Iterator[_Problem]:
    if hook not in HOOKS:
        near = difflib.get_close_matches(hook, HOOKS, n=1)
        yield _Problem(
            f"there is no hook {hook}" + (f"; did you mean {near[0]}?" if near else ""),
            f"Rename {attribute}, or take @comm_core.hookimpl off it; the hooks are {', '.join(sorted(HOOKS))}.",
        )
        return
    plain = f"Mark {hook} with a plain @comm_core.hookimpl."
    if options.get("wrapper") or options.get("hookwrapper"):
        yield _Problem(f"{hook} is a wrapper, and a backend has no hooks of others to wrap", plain)
        return
    if options.get("optionalhook"):
        yield _Problem(f"{hook} is marked optionalhook=True, which would hide a misspelt name", plain)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        yield _Problem(f"{hook} is async, and nothing awaits it", f"Write {_signature_text(hook)}.")
    elif inspect.isgeneratorfunction(function):
        context = " Put @contextlib.contextmanager between @comm_core.hookimpl and it." if hook == "capture_ctx" else ""
        yield _Problem(f"{hook} is a generator function", f"Return from {hook} instead of yielding.{context}")
    yield from _signature_problems(hook, function)


def _pair_problems(hooks: Mapping[str, object]) -> Iterator[_Problem]:
    for one, other in (pair[::step] for pair in _PAIRS for step in (1, -1)):
        if one in hooks and other not in hooks:
            yield _Problem(f"it has {one} but not {other}", f"Implement {_signature_text(other)} too, or neither.")


def _signature_problems(hook: str, function: Callable[..., Any]) -> Iterator[_Problem]:
    signature = inspect.signature(function)
    parameters = tuple(signature.parameters.values())
    faults = [*_kind_faults(parameters), *_name_faults(HOOKS[hook], tuple(signature.parameters))]
    if not faults:
        return
    bare = signature.replace(
        parameters=[parameter.replace(annotation=parameter.empty) for parameter in parameters],
        return_annotation=signature.empty,
    )
    remedy = f"Write {_signature_text(hook)}: the spec's parameters, in its order, and nothing else."
    if parameters and parameters[0].name == "self":
        remedy += " If the entry point names a class, let it name an instance."
    yield _Problem(f"{hook}{bare} {', '.join(faults)}", remedy)


def _kind_faults(parameters: tuple[inspect.Parameter, ...]) -> Iterator[str]:
    kinds = {parameter.kind for parameter in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        yield "takes variable positional arguments"
    if inspect.Parameter.VAR_KEYWORD in kinds:
        yield "takes variable keyword arguments"
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        yield "has keyword-only parameters"
    if any(parameter.default is not parameter.empty for parameter in parameters):
        yield "has defaults"


def _name_faults(expected: tuple[str, ...], found: tuple[str, ...]) -> Iterator[str]:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        yield f"lacks {', '.join(missing)}"
    if unknown:
        yield f"has {', '.join(unknown)}, which the spec doesn't"
    if not missing and not unknown and found != expected:
        yield "has the parameters in another order than the spec"


def _pluggy_mismatches(manager: pluggy.PluginManager, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[_Problem]:
    # A decorator may show one signature to inspect and another to pluggy, and pluggy then drops arguments silently.
    for hook in hooks:
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if tuple(implementation.argnames) != HOOKS[hook]:
                yield _Problem(
                    f"pluggy reads the parameters of {hook} as ({', '.join(implementation.argnames)})",
                    f"Use functools.wraps in the decorator of {hook}, or remove the decorator.",
                )


def _signature_text(hook: str) -> str:
    return f"def {hook}({', '.join(HOOKS[hook])})"
