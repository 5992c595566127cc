import logging
from importlib.metadata import entry_points

from sglang.srt.plugins.hook_registry import HookRegistry

GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"


def load_plugins():
    for entry in entry_points(group=GENERAL_PLUGINS_GROUP):
        try:
            entry.load()()
        except Exception:
            logging.getLogger(__name__).exception("Failed to execute general plugin: %s", entry.name)
    HookRegistry.apply_hooks()
