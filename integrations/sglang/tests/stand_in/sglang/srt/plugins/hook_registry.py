import functools
import logging
import pkgutil
from collections import defaultdict
from collections.abc import Callable
from enum import Enum


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    """Wraps functions by their dotted names; a failure is only logged."""

    _hooks = defaultdict(list)
    _patched = set()

    @classmethod
    def register(
        cls, target: str, hook: Callable, hook_type: HookType = HookType.AROUND, *, source: object | None = None
    ):
        cls._hooks[target].append((hook_type, hook, source))

    @classmethod
    def apply_hooks(cls):
        for target, hooks in cls._hooks.items():
            if target in cls._patched:
                continue
            try:
                owner, _, name = target.rpartition(".")
                found = pkgutil.resolve_name(owner)
                for _, hook, _ in hooks:
                    setattr(found, name, _wrap(getattr(found, name), hook))
                cls._patched.add(target)
            except Exception:
                logging.getLogger(__name__).exception("Failed to apply hooks to %s", target)


def _wrap(original, hook):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        return hook(original, *args, **kwargs)

    return wrapper
