"""Installed plugins are found without importing, loaded one by one, and those that are broken harm no other."""

from __future__ import annotations

import importlib
import logging
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from comm_core._plugins import discovery
from comm_core._plugins.discovery import InstalledPlugin, LoadFailure
from comm_core._plugins.installed import PluginRejectedError, check_requirements
from comm_core.errors import PluginLoadError

PATIENCE_S = 60.0

GOOD = """
    from comm_core import hookimpl

    COMM_HOOK_API = (1, 0)

    @hookimpl
    def all_reduce(session, tensor, out):
        return tensor
"""


class Site:
    """A folder on the path into which distributions are put as an installer would, but without one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: set[str] = set()
        self.modules: set[str] = set()

    def install(
        self,
        distribution: str,
        entries: dict[str, str],
        *,
        modules: dict[str, str] | None = None,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
        folder: str = ".",
    ) -> Path:
        info = self.folder / folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[comm_core.backends]", *lines, ""]), encoding="utf-8")
        header = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        header += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join([*header, ""]), encoding="utf-8")
        for name, source in (modules or {}).items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        self.names |= set(entries)
        self.modules |= set(modules or {})
        importlib.invalidate_caches()
        discovery.reset()
        return info

    def discover(self) -> discovery.Discovery:
        """What of this site is found; what else is installed where the tests run is left alone."""
        return discovery.discover(self.names.__contains__, PATIENCE_S)

    def listed(self) -> dict[str, InstalledPlugin | LoadFailure]:
        return {item.name: item for item in discovery.installed_plugins()}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    found = Site(tmp_path)
    discovery.reset()
    yield found
    for name in found.modules:
        sys.modules.pop(name, None)
    discovery.reset()


def load(entry: discovery.InstalledPlugin, timeout_s: float) -> discovery.Plugin:
    verdict = discovery._load_once(entry, timeout_s)
    if isinstance(verdict, discovery.LoadFailure):
        raise PluginLoadError(str(verdict))
    return verdict


def broken_beside_good(site: Site, source: str) -> LoadFailure:
    """The failure of a plugin with this source; asserts that a good one, later in the alphabet, loads all the same."""
    site.install("plugin-broken", {"broken": "plugin_broken"}, modules={"plugin_broken": source}, version="2.5")
    site.install("plugin-good", {"good": "plugin_good"}, modules={"plugin_good": GOOD})
    found = site.discover()
    assert set(found.plugins) == {"good"}
    assert set(found.failures) == {"broken"}
    return found.failures["broken"]


def test_a_good_plugin_is_listed_without_import_and_then_loaded(site: Site) -> None:
    site.install("Plugin.Good", {"good": "plugin_good"}, modules={"plugin_good": GOOD}, version="1.2")
    entry = site.listed()["good"]
    assert isinstance(entry, InstalledPlugin)
    assert (entry.value, entry.distribution, entry.version) == ("plugin_good", "plugin-good", "1.2")
    assert "plugin_good" not in sys.modules

    plugin = load(entry, PATIENCE_S)
    assert (plugin.name, plugin.distribution, plugin.version) == ("good", "plugin-good", "1.2")
    assert plugin.has("all_reduce")
    assert not plugin.has("connect")
    assert plugin.hooks["all_reduce"]("session", "tensor", None) == "tensor"
    assert plugin.hooks["all_reduce"]("session", "tensor", None) == "tensor"
    assert load(entry, PATIENCE_S) is plugin


def test_an_entry_may_name_an_object(site: Site) -> None:
    source = """
        from comm_core import hookimpl

        class Backend:
            COMM_HOOK_API = (1, 0)

            @hookimpl
            def all_reduce(self, session, tensor, out):
                return (self, tensor)

            @staticmethod
            @hookimpl
            def close(session, orderly):
                return orderly

        backend = Backend()
    """
    site.install("plugin-object", {"good": "plugin_object:backend"}, modules={"plugin_object": source})
    plugin = site.discover().plugins["good"]
    assert plugin.hooks["all_reduce"](None, 7, None) == (sys.modules["plugin_object"].backend, 7)
    assert plugin.hooks["close"](None, True) is True


def test_what_is_not_wanted_is_listed_but_not_imported(site: Site) -> None:
    site.install("plugin-one", {"one": "plugin_one"}, modules={"plugin_one": "raise ValueError"}, version="1.1")
    found = discovery.discover({"another"}.__contains__, PATIENCE_S)
    assert not found.plugins
    assert not found.failures
    assert found.listed["one"] == "1.1"
    assert "plugin_one" not in sys.modules


ODD_OBJECT = """
    import sys

    class Odd:
        COMM_HOOK_API = (1, 0)

        def __dir__(self):
            raise OSError("odd")

    sys.modules[__name__] = Odd()
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libfast.so.2: cannot open\\n shared object')", "libfast.so.2: cannot open shared object"),
        ("import sys; sys.exit('no driver')", "SystemExit: no driver"),
        ("class Stop(BaseException): pass\nraise Stop('odd')", "Stop: odd"),
        ("raise TimeoutError('its own')", "its import raised TimeoutError: its own"),
        ("def (", "SyntaxError"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        (ODD_OBJECT, "OSError: odd"),
    ],
)
def test_an_import_that_raises_is_a_failure_and_harms_no_other(
    site: Site, source: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="comm_core"):
        failure = broken_beside_good(site, source)
    assert reason in failure.reason
    assert "COMM_CORE_DISABLE=broken" in failure.remedy
    assert (failure.distribution, failure.version) == ("plugin-broken", "2.5")
    for part in ("'broken'", "plugin-broken 2.5", failure.reason, failure.remedy):
        assert part in str(failure)
    # Said aloud once a job, by who negotiates: not by every rank and process.
    assert str(failure) in caplog.messages
    assert all(record.levelno < logging.WARNING for record in caplog.records)


@pytest.mark.parametrize("value", ["plugin_absent", "plugin_empty:backend", "not-a-module", ""])
def test_a_value_that_leads_nowhere_is_a_failure(site: Site, value: str) -> None:
    site.install("plugin-broken", {"broken": value}, modules={"plugin_empty": ""})
    site.install("plugin-good", {"good": "plugin_good"}, modules={"plugin_good": GOOD})
    site.names.add("plugin-broken")
    found = site.discover()
    assert set(found.plugins) == {"good"}
    # Some releases of importlib_metadata refuse a malformed value on listing, for the whole distribution.
    (failure,) = found.failures.values()
    assert "its import raised" in failure.reason or "its metadata can't be read" in failure.reason


def test_an_interrupt_goes_through_and_is_no_verdict(site: Site) -> None:
    source = "import sys\nif not hasattr(sys, 'second_time'):\n    sys.second_time = 1; raise KeyboardInterrupt\n"
    site.install("plugin-one", {"one": "plugin_one"}, modules={"plugin_one": source + textwrap.dedent(GOOD)})
    try:
        with pytest.raises(KeyboardInterrupt):
            site.discover()
        assert "one" in site.discover().plugins
    finally:
        vars(sys).pop("second_time", None)


def test_an_import_that_hangs_is_a_failure_also_once_it_is_done(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = SimpleNamespace(open=threading.Event(), passed=threading.Event())
    monkeypatch.setitem(sys.modules, "gate_of_this_test", gate)
    source = "import gate_of_this_test as gate\ngate.open.wait(60)\n" + textwrap.dedent(GOOD) + "\ngate.passed.set()\n"
    site.install("plugin-broken", {"broken": "plugin_broken"}, modules={"plugin_broken": source})
    site.install("plugin-good", {"good": "plugin_good"}, modules={"plugin_good": GOOD})
    entry = site.listed()["broken"]
    assert isinstance(entry, InstalledPlugin)
    with pytest.raises(PluginLoadError, match=r"hasn't returned after 0\.1 s.*COMM_CORE_IMPORT_TIMEOUT_S"):
        load(entry, 0.1)
    assert set(site.discover().plugins) == {"good"}
    gate.open.set()
    assert gate.passed.wait(PATIENCE_S)
    assert set(site.discover().failures) == {"broken"}


def test_a_failure_is_kept_and_its_import_not_repeated(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setitem(sys.modules, "log_of_this_test", SimpleNamespace(log=log))
    source = "from log_of_this_test import log\nlog.append('imported')\nraise ValueError('no')"
    site.install("plugin-one", {"one": "plugin_one"}, modules={"plugin_one": source})
    entry = site.listed()["one"]
    assert isinstance(entry, InstalledPlugin)
    for _ in range(2):
        with pytest.raises(
            PluginLoadError, match=r"'one' \(plugin-one 1.0\) isn't used: its import raised ValueError: no"
        ):
            load(entry, PATIENCE_S)
    assert site.discover().failures["one"].reason == "its import raised ValueError: no"
    assert log == ["imported"]


def test_all_of_a_name_that_several_register_are_refused(site: Site) -> None:
    site.install("plugin-a", {"same": "plugin_a"}, modules={"plugin_a": GOOD}, version="1.0")
    site.install("plugin-b", {"same": "plugin_b"}, modules={"plugin_b": GOOD}, version="2.0")
    site.install("plugin-good", {"good": "plugin_good"}, modules={"plugin_good": GOOD})
    found = site.discover()
    assert set(found.plugins) == {"good"}
    failure = found.failures["same"]
    for part in ("plugin-a (plugin_a)", "plugin-b (plugin_b)", "2 times"):
        assert part in failure.reason
    assert "Uninstall all but one" in failure.remedy
    assert not {"plugin_a", "plugin_b"} & set(sys.modules)


def test_a_distribution_that_shadows_another_of_its_name_is_no_duplicate(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("plugin-good", {"good": "old", "gone": "old"}, version="1.0", folder="later")
    site.install("plugin-good", {"good": "new"}, version="2.0", folder="first")
    monkeypatch.syspath_prepend(site.folder / "later")
    monkeypatch.syspath_prepend(site.folder / "first")
    listed = site.listed()
    entry = listed["good"]
    assert isinstance(entry, InstalledPlugin)
    assert (entry.value, entry.version) == ("new", "2.0")
    assert "gone" not in listed


def test_a_distribution_that_gave_up_its_backend_hides_the_older_one_behind_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("plugin-good", {"gone": "old"}, version="1.0", folder="later")
    newer = site.install("plugin-good", {}, version="2.0", folder="first")
    (newer / "entry_points.txt").unlink()
    monkeypatch.syspath_prepend(site.folder / "later")
    assert "gone" in site.listed()
    discovery.reset()
    monkeypatch.syspath_prepend(site.folder / "first")
    assert "gone" not in site.listed()


def test_remains_without_metadata_dont_hide_an_intact_distribution(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    remains = site.install("plugin-good", {"good": "old"}, version="1.0", folder="first")
    (remains / "METADATA").unlink()
    site.install("plugin-good", {"good": "new"}, version="2.0", folder="later")
    monkeypatch.syspath_prepend(site.folder / "later")
    monkeypatch.syspath_prepend(site.folder / "first")
    entry = site.listed()["good"]
    assert isinstance(entry, InstalledPlugin)
    assert (entry.value, entry.version) == ("new", "2.0")


def test_remains_without_metadata_alone_are_a_failure(site: Site) -> None:
    remains = site.install("plugin-good", {"good": "plugin_good"}, modules={"plugin_good": GOOD})
    (remains / "METADATA").unlink()
    found = site.discover()
    assert not found.plugins
    assert "has no metadata" in found.failures["good"].reason
    assert "dist-info" in found.failures["good"].remedy
    assert found.listed["good"] == "unknown"


def test_an_entry_points_file_that_cant_be_read_harms_no_other(site: Site) -> None:
    malformed = site.install("plugin-malformed", {})
    (malformed / "entry_points.txt").write_text("[comm_core.backends]\nno equals sign\n", encoding="utf-8")
    undecodable = site.install("plugin-undecodable", {})
    (undecodable / "entry_points.txt").write_bytes(b"[\xff\xfe]\n")
    site.install("plugin-good", {"good": "plugin_good"}, modules={"plugin_good": GOOD})
    site.names.add("plugin-malformed")
    found = site.discover()
    assert set(found.plugins) == {"good"}
    assert "its metadata can't be read" in found.failures["plugin-malformed"].reason
    assert "pip install --force-reinstall" in found.failures["plugin-malformed"].remedy


@pytest.mark.parametrize("name", ["Fast", "fast-one", "1fast", "_fast", "fäst", "fast.one"])
def test_a_name_outside_the_alphabet_is_refused(site: Site, name: str) -> None:
    site.install("plugin-one", {name: "plugin_one"}, modules={"plugin_one": GOOD})
    assert "isn't a valid backend name" in site.discover().failures[name].reason
    with pytest.raises(PluginLoadError, match=r"isn't a valid backend name"):
        discovery.load_object(name, object())


def test_the_terminal_fallbacks_name_is_reserved(site: Site) -> None:
    site.install("plugin-one", {"torch_distributed": "plugin_one"}, modules={"plugin_one": GOOD})
    found = discovery.discover(lambda name: name.startswith("plugin-one"), PATIENCE_S)
    assert not found.plugins
    assert "comm-core's own fallback" in found.failures["plugin-one:torch_distributed"].reason
    assert "torch_distributed" not in found.listed


def test_a_plugin_for_another_core_is_refused_before_its_import(site: Site) -> None:
    site.install(
        "plugin-one",
        {"one": "plugin_one"},
        modules={"plugin_one": GOOD},
        requires=("torch", "comm-core>=77,<78"),
    )
    failure = site.discover().failures["one"]
    assert "requires 'comm-core<78,>=77'" in failure.reason or "requires 'comm-core>=77,<78'" in failure.reason
    assert "pip install --upgrade plugin-one comm-core" in failure.remedy
    assert "plugin_one" not in sys.modules


def test_a_plugin_for_other_hooks_is_refused_with_the_command_that_mends_it(site: Site) -> None:
    failure = broken_beside_good(site, textwrap.dedent(GOOD).replace("(1, 0)", "(2, 0)"))
    assert "written for version 2.0 of the hooks" in failure.reason
    assert failure.remedy.endswith(": pip install --upgrade plugin-broken comm-core")


@pytest.mark.parametrize(
    ("requirement", "running", "fits"),
    [
        ("comm-core", "0.1.0", True),
        ("comm-core>=0.1,<0.2", "0.1.3", True),
        ("comm-core>=0.1,<0.2", "0.2.0", False),
        ("Comm_Core (>=0.2)", "0.1.0", False),
        ("comm-core-extras>=9", "0.1.0", True),
        ("comm-core>=0.1", "0.2rc1", True),
        ("comm-core>=0.2", "0.2rc1", False),
        ("comm-core<0.2", "0.2.dev1", False),
        ("comm-core>=0.1", "0.1.0+local", True),
        ("comm-core>=9; extra == 'test'", "0.1.0", True),
        ("comm-core>=9; extra == 'fast'", "0.1.0", False),
        ("comm-core>=9; python_version < '3'", "0.1.0", True),
        ("comm-core>=9; python_version >= '3'", "0.1.0", False),
        ("comm-core @ https://example.org/core.whl", "0.1.0", True),
        ("comm-core>=>9", "0.1.0", False),
        ("unrelated>=>9", "0.1.0", True),
    ],
)
def test_requirements_on_core(requirement: str, running: str, fits: bool) -> None:
    entry = InstalledPlugin("one", "plugin_one [fast, other-extra]", "plugin-one", "1.0", ("torch>=2", requirement))
    if fits:
        check_requirements(entry, running)
    else:
        with pytest.raises(PluginRejectedError, match=r"requires|can't be read"):
            check_requirements(entry, running)
