"""Metadata of any size or content is refused by its plugin's own, shortened name; the other plugins load."""

from __future__ import annotations

import json

import pytest
from comm_core._plugins import discovery
from comm_core._plugins.installed import InstalledPlugin, LoadFailure, check_requirements
from test_discovery import GOOD, PATIENCE_S, Site, site

__all__ = ["site"]

LONG = 100_000
# For one plugin's name, version, reason and remedy, in bytes as JSON.
MOST_NBYTES = 2000


def failure_beside_good(site: Site, *others: str, but: int = 0) -> LoadFailure:
    """The one failure of the site, printable and short; asserts that a good plugin, and others, load all the same."""
    site.install("plugin-good", {"good": "plugin_good"}, modules={"plugin_good": GOOD})
    # A refused name isn't the one that was installed.
    names = {item.name for item in discovery.installed_plugins() if not (item.distribution or "").startswith("comm-")}
    found = discovery.discover(names.__contains__, PATIENCE_S)
    assert {"good", *others} <= set(found.plugins)
    assert len(found.plugins) == 1 + but
    (failure,) = found.failures.values()
    assert str(failure).isprintable()
    assert len(json.dumps([failure.name, found.listed[failure.name], failure.reason, failure.remedy])) < MOST_NBYTES
    return failure


@pytest.mark.parametrize(
    ("name", "value", "version", "reason"),
    [
        ("e" * LONG, "plugin_odd", "1.0", "its name has 100000 characters; the limit is 64"),
        ("odd", "e" * LONG, "1.0", "its value has 100000 characters; the limit is 256"),
        ("odd", "plugin_odd", "1." + "0" * LONG, "its version has 100002 characters; the limit is 64"),
        ("odd", "plugin_odd", "1.0\x1b[2J", "its version has characters that can't be printed"),
        ("odd", "plugin\x07odd", "1.0", "its value has characters that can't be printed"),
        ("o\x1bdd", "plugin_odd", "1.0", "'o?dd' isn't a valid backend name"),
        ("\U0001f480" * 60, "plugin_odd", "1.0", "isn't a valid backend name"),
    ],
    ids=["name", "value", "version", "escape in version", "escape in value", "escape in name", "emoji"],
)
def test_metadata_too_long_or_unprintable(site: Site, name: str, value: str, version: str, reason: str) -> None:
    # The folder's name can't have the version.
    info = site.install("plugin-odd", {name: value}, modules={"plugin_odd": GOOD})
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-odd\nVersion: {version}\n", encoding="utf-8")
    discovery.reset()
    failure = failure_beside_good(site)
    assert reason in failure.reason
    assert (failure.name == name) == (name == "odd")


@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('x' * 100_000)",
        "raise ImportError('\\x1b[2J' * 1000)",
        "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
        "COMM_HOOK_API = ['x' * 100_000]",
        "COMM_HOOK_API = (10**5000, 0)",
        "raise ImportError(chr(0xd800))",
        "import comm_core\nCOMM_HOOK_API = (1, 0)\ndef f(): pass\nglobals()['x' * 100_000] = comm_core.hookimpl(f)",
    ],
)
def test_an_import_that_fails_at_length_or_with_control_characters(site: Site, source: str) -> None:
    site.install("plugin-odd", {"odd": "plugin_odd"}, modules={"plugin_odd": source})
    assert failure_beside_good(site).name == "odd"


@pytest.mark.parametrize(
    "requirement",
    [
        "comm-core>=" + "1" * 5000,
        "comm-core>=" + "1" * 900,
        "comm-core>=1!" + "9" * 900,
        "comm-core; " + "(" * 900 + "python_version > '3'" + ")" * 900,
        "comm-core; python_version > '" + "9" * 4400 + "'",
        "comm-core[" + "a," * 60_000 + "a]",
        "comm-core>=\x1b[2J",
    ],
)
def test_a_requirement_that_nobody_can_read(requirement: str) -> None:
    entry = InstalledPlugin("odd", "plugin_odd", "plugin-odd", "1.0", (requirement,))
    with pytest.raises(discovery.PluginRejectedError) as raised:
        check_requirements(entry, "0.1.0")
    assert len(raised.value.reason) < 1000
    assert raised.value.reason.isprintable()


def test_more_backends_than_a_message_lists_cost_only_their_own_distribution(site: Site) -> None:
    site.install(
        "plugin-many",
        {f"a_backend_with_a_long_name_{number:04}": "plugin_many" for number in range(700)},
        modules={"plugin_many": GOOD},
    )
    site.install("plugin-more", {f"backend_{number:04}": "plugin_many" for number in range(100)})
    failure = failure_beside_good(site, "backend_0000", but=100)
    assert failure.name == "(plugin-many)"
    assert "the names of the 700 backends of plugin-many are more than the ranks can list" in failure.reason
    assert len(json.dumps({item.name: item.version for item in discovery.installed_plugins()})) < 16 << 10


def test_thousands_of_distributions_are_no_more_than_a_message_lists(site: Site) -> None:
    for number in range(1500):
        site.install(f"plugin-{number:04}", {f"backend_{number:04}": "plugin_one"})
    assert len(json.dumps({item.name: item.version for item in discovery.installed_plugins()})) < 16 << 10
    assert sum(isinstance(item, InstalledPlugin) for item in discovery.installed_plugins()) > 300


def test_many_distributions_of_one_name_are_refused_in_a_short_text(site: Site) -> None:
    for number in range(60):
        site.install(f"plugin-{number}", {"same": f"plugin_{number}:{'x' * 200}"})
    failure = failure_beside_good(site)
    assert failure.name == "same"
    assert "registered 60 times" in failure.reason
