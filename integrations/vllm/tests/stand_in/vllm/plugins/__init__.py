from importlib.metadata import entry_points

DEFAULT_PLUGINS_GROUP = "vllm.general_plugins"


def load_general_plugins():
    for point in entry_points(group=DEFAULT_PLUGINS_GROUP):
        point.load()()
