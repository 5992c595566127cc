"""The report of `comm-core doctor`: its data, its problems and its text. Pure."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from packaging.version import InvalidVersion, Version

from comm_core._schema import printable, shorten
from comm_core.env import Settings
from comm_core.topology import Device, Host, Link
from comm_core.types import TERMINAL

__all__ = ["PluginLine", "Problem", "Report", "diagnose", "render", "to_json"]

#: The version of the JSON.
SCHEMA = 1
#: The oldest supported torch, as in core's requirements.
_OLDEST_TORCH = "2.8"
#: The longest line of the text, as JSON in bytes: a variable or a plugin's facts may have any length.
_LINE_NBYTES = 2000
#: The default size of /dev/shm in containers, in bytes; one data loader can fill it.
_SMALL_SHM_NBYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem and its fix."""

    what: str
    fix: str


@dataclasses.dataclass(frozen=True)
class PluginLine:
    """One installed plugin or integration.

    Attributes:
        name: the name of the backend, or of the serving engine.
        distribution: its distribution's name; None if unknown.
        version: its distribution's version; None if unknown.
        usable: whether it loaded; None if the environment excludes it.
        reason: the reason why it isn't usable.
        remedy: the remedy.
        facts: the result of its `probe()`, or of the integration's entry point; None if it has none.
        serves_cpus: whether it serves groups of CPUs, or would if nothing were missing.
        faults: what its hooks do wrong on topologies that come with comm-core.
    """

    name: str
    distribution: str | None
    version: str | None
    usable: bool | None
    reason: str = ""
    remedy: str = ""
    facts: Any = None
    serves_cpus: bool = False
    faults: tuple[Problem, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """The facts that `comm-core doctor` found.

    Attributes:
        versions: as in `comm_core.RankInfo`.
        torch: "cuda": whether it can use a GPU; "process_groups": the backends that it was built with. Empty if it
            can't be imported.
        system: the operating system, processor and compilers, and other packages that matter, by name, in words.
        host: this host.
        devices: every GPU of the host that NVML sees.
        environment: the relevant variables.
        settings: core's settings from them; None if one can't be read.
        misspelt: variables with core's prefix that core doesn't read.
        plugins: the installed plugins, sorted by name.
        integrations: the installed integrations into serving engines, sorted by name.
        crashes: the processes of the last day that ended within a plugin's hook.
        unknown: the reason for each unknown fact, by its field's name.
    """

    versions: Mapping[str, str]
    torch: Mapping[str, Any]
    host: Host
    devices: Sequence[Device]
    environment: Mapping[str, str]
    settings: Settings | None
    misspelt: Sequence[str]
    plugins: Sequence[PluginLine]
    unknown: Mapping[str, str]
    integrations: Sequence[PluginLine] = ()
    crashes: Sequence[Problem] = ()
    system: Mapping[str, str] = dataclasses.field(default_factory=dict)


def diagnose(report: Report) -> tuple[Problem, ...]:
    """Return the problems, causes before their effects."""
    return (
        *_torch_problems(report),
        *_gpu_problems(report),
        *_host_problems(report),
        *_setting_problems(report),
        *_plugin_problems(report),
    )


def _torch_problems(report: Report) -> Iterator[Problem]:
    reinstall = f'Reinstall it: python -m pip install --force-reinstall "torch>={_OLDEST_TORCH}"'
    if "torch" not in report.versions:
        yield Problem(f"torch can't be imported: {report.unknown.get('versions.torch', 'no reason given')}", reinstall)
        return
    if _is_older(report.versions["torch"], _OLDEST_TORCH):
        yield Problem(f"torch {report.versions['torch']} is older than {_OLDEST_TORCH}", reinstall)
    if not report.torch.get("process_groups"):
        reason = report.unknown.get("torch.distributed", "it was built without them")
        yield Problem(f"torch has no process groups: {reason}", "Install a build of torch with torch.distributed.")


def _is_older(version: str, oldest: str) -> bool:
    try:
        return Version(version).release < Version(oldest).release
    except InvalidVersion:
        return False


def _gpu_problems(report: Report) -> Iterator[Problem]:
    for field, reason in report.unknown.items():
        if field.startswith("NVML's device"):
            yield Problem(
                f"{field} doesn't answer: {reason}", "Look at nvidia-smi and the kernel's log; reset it or restart."
            )
    if "torch" not in report.versions:
        return
    usable = report.torch.get("cuda", False)
    visible = report.environment.get("CUDA_VISIBLE_DEVICES")
    if report.devices and not usable:
        if visible is not None and visible.strip() in {"", "-1"}:
            yield Problem(
                f"CUDA_VISIBLE_DEVICES={visible!r} hides all {len(report.devices)} GPUs from torch",
                "Unset it to use them.",
            )
        elif "cuda" not in report.versions:
            yield Problem("this host has GPUs, and torch is a build without CUDA", "Install a CUDA build of torch.")
        else:
            yield Problem(
                f"torch can't use this host's GPUs: {report.unknown.get('torch.cuda', 'no reason given')}",
                f"Match the driver ({report.versions.get('driver', 'version unknown')}) to torch's CUDA "
                f"({report.versions['cuda']}), and check that this user may open /dev/nvidia*.",
            )
    if usable and "nvml" in report.unknown:
        yield Problem(
            f"NVML can't be used ({report.unknown['nvml']}), so NVLinks stay unknown",
            "python -m pip install nvidia-ml-py; in a container, have the driver's libnvidia-ml.so.1 mounted "
            "(NVIDIA_DRIVER_CAPABILITIES=compute,utility).",
        )
    if usable and "nccl" not in report.torch.get("process_groups", ()):
        yield Problem(
            "torch can use GPUs but was built without NCCL, the end of every group's plan",
            "Install a build of torch with NCCL.",
        )


def _host_problems(report: Report) -> Iterator[Problem]:
    if "host.boot_id" in report.unknown:
        yield Problem(
            f"the running kernel's identity can't be read ({report.unknown['host.boot_id']}), so every rank counts as "
            "a host of its own and no two share memory",
            "Mount procfs at /proc.",
        )
    if "host.id" in report.unknown:
        yield Problem(
            f"the IPC namespace or /dev/shm can't be identified ({report.unknown['host.id']})",
            "Mount procfs at /proc and a tmpfs at /dev/shm.",
        )
    free = report.host.shm_nbytes
    if free is not None and free <= _SMALL_SHM_NBYTES:
        yield Problem(
            f"only {_size(free)} are free in /dev/shm, too little for a group's shared memory",
            "Start the container with --shm-size=1g or --ipc=host, or remove what fills it.",
        )


def _setting_problems(report: Report) -> Iterator[Problem]:
    if report.settings is None:
        yield Problem(
            report.unknown.get("settings", "the settings can't be read"), "Correct the variable, or unset it."
        )
    for name in report.misspelt:
        near = difflib.get_close_matches(name, Settings.variables(), n=1, cutoff=0.85)
        if near:
            yield Problem(f"{name} means nothing to core", f"Did you mean {near[0]}? Rename it, or unset it.")
    if report.settings is not None and TERMINAL in report.settings.disable:
        yield Problem(
            f"COMM_CORE_DISABLE names '{TERMINAL}', which can't be disabled: every plan ends with it",
            "Remove the name.",
        )
    if report.settings is not None and "plugins" not in report.unknown:
        installed = {plugin.name for plugin in report.plugins} | {TERMINAL}
        for variable, names in (
            ("COMM_CORE_BACKENDS", report.settings.backends or ()),
            ("COMM_CORE_DISABLE", report.settings.disable),
            ("COMM_CORE_TUNE", tuple(dict.fromkeys(rule.backend for rule in report.settings.tuning.rules))),
            ("COMM_CORE_PLUGINS", report.settings.plugins or ()),
        ):
            yield from (_unknown_name(variable, name, sorted(installed)) for name in names if name not in installed)


def _unknown_name(variable: str, name: str, installed: Sequence[str]) -> Problem:
    what = f"{variable} names '{name}', which isn't installed"
    near = difflib.get_close_matches(name.lower(), installed, n=1)
    if near:
        return Problem(what, f"Did you mean {near[0]}? Correct it, or remove the name.")
    return Problem(what, f"Install its plugin, or remove the name; installed are {', '.join(installed)}.")


def _plugin_problems(report: Report) -> Iterator[Problem]:
    if "plugins" in report.unknown:
        yield Problem(f"plugins can't be listed: {report.unknown['plugins']}", "Reinstall comm-core.")
    yield from report.crashes
    for plugin in report.plugins:
        if plugin.usable is False:
            yield Problem(f"plugin '{plugin.name}' can't be used: {plugin.reason}", plugin.remedy)
        for fault in plugin.faults:
            yield Problem(f"plugin '{plugin.name}': {fault.what}", fault.fix)
        # The fact for `eligibility.missing_dependency`. A host without GPUs may lack the dependencies of GPU plugins.
        missing = plugin.facts.get("missing") if isinstance(plugin.facts, dict) else None
        if missing and (report.devices or plugin.serves_cpus):
            yield Problem(
                f"plugin '{plugin.name}' can't serve on this host: {missing}",
                f"Fix that, or disable the plugin: COMM_CORE_DISABLE={plugin.name}.",
            )
    for item in report.integrations:
        if item.usable is False:
            yield Problem(f"integration '{item.name}' can't be used: {item.reason}", item.remedy)
        elif isinstance(item.facts, dict) and item.facts.get("missing"):
            yield Problem(
                f"integration '{item.name}' has no effect: {item.facts['missing']}",
                f"Fix that, or uninstall {item.distribution}.",
            )


def to_json(report: Report, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the report as JSON, with its schema number."""
    return {
        "schema": SCHEMA,
        "versions": dict(report.versions),
        "torch": dict(report.torch),
        "system": dict(report.system),
        "host": dataclasses.asdict(report.host),
        "devices": [dataclasses.asdict(device) for device in report.devices],
        "environment": dict(report.environment),
        "misspelt": list(report.misspelt),
        "plugins": [dataclasses.asdict(plugin) for plugin in report.plugins],
        "integrations": [dataclasses.asdict(item) for item in report.integrations],
        "unknown": dict(report.unknown),
        "problems": [dataclasses.asdict(problem) for problem in problems],
    }


def render(report: Report, problems: Sequence[Problem]) -> str:
    """Return the report as text, ending with the numbered fixes."""
    sections = {
        "Versions": [f"{name}: {version}" for name, version in report.versions.items()],
        "torch": [f"{name}: {_format_value(value)}" for name, value in report.torch.items()] or ["can't be imported"],
        "System": [f"{name}: {value}" for name, value in report.system.items()],
        "Host": _host_lines(report.host),
        "GPUs, as NVML sees them": [_device_line(i, device) for i, device in enumerate(report.devices)] or ["none"],
        "Links": list(_link_lines(report.devices)),
        "Environment": [_variable_line(name, value, report) for name, value in report.environment.items()]
        or ["no relevant variable is set"],
        "Plugins": [_plugin_line(plugin) for plugin in report.plugins]
        or [f"none: every group uses {TERMINAL}" if "plugins" not in report.unknown else "can't be listed"],
        "Integrations": [_plugin_line(item) for item in report.integrations],
        "Unknown": [f"{field}: {reason}" for field, reason in report.unknown.items()],
    }
    lines: list[str] = []
    for title, content in sections.items():
        if content:
            lines += [title, *(f"  {shorten(line, _LINE_NBYTES)}" for line in content), ""]
    # Names, reasons, facts and variables come from other software.
    return "\n".join(map(printable, [*lines, *(shorten(line, _LINE_NBYTES) for line in _fix_lines(problems))]))


def _host_lines(host: Host) -> list[str]:
    free = "unknown" if host.shm_nbytes is None else _size(host.shm_nbytes)
    return [
        f"name: {host.name}",
        f"identity: {host.id}",
        f"network namespace: {host.network or 'unknown'}",
        f"free in /dev/shm: {free}",
    ]


def _device_line(index: int, device: Device) -> str:
    capability = ".".join(map(str, device.capability))
    fabric = f", fabric {device.fabric}" if device.fabric else ""
    return f"GPU{index}: {device.name}, {capability}, {_size(device.memory_nbytes)}, {device.uuid}{fabric}"


def _link_lines(devices: Sequence[Device]) -> Iterator[str]:
    if len(devices) < 2:
        return
    names = [f"GPU{index}" for index in range(len(devices))]
    yield _row("", names)
    reasons: dict[str, list[str]] = {}
    for name, device in zip(names, devices, strict=True):
        cells = []
        for peer_name, peer in zip(names, devices, strict=True):
            link = device.links.get(peer.uuid, Link(reason="NVML reports no link"))
            cells.append("X" if peer is device else _link_cell(link))
            if peer is not device and link.reason:
                reasons.setdefault(link.reason, []).append(f"{name}-{peer_name}")
        yield _row(name, cells)
    yield "NV#: that many NVLinks; P2P: peer access without NVLink; no: no peer access; ?: unknown"
    for reason, pairs in reasons.items():
        yield f"{reason}: {', '.join(pairs)}"


def _row(head: str, cells: Iterable[str]) -> str:
    return "".join(f"{cell:<7}" for cell in (head, *cells)).rstrip()


def _link_cell(link: Link) -> str:
    if link.nvlinks:
        return f"NV{link.nvlinks}"
    return {True: "P2P", False: "no", None: "?"}[link.p2p]


def _variable_line(name: str, value: str, report: Report) -> str:
    note = "  (not core's: a plugin's own, or misspelt)" if name in report.misspelt else ""
    return f"{name}={value}{note}"


def _plugin_line(plugin: PluginLine) -> str:
    state = {True: "loaded", False: "can't be used: ", None: "not loaded: "}[plugin.usable]
    facts = plugin.facts.items() if isinstance(plugin.facts, dict) else ()
    words = [
        f"{name.replace('_', ' ')}: {_format_value(value)}" for name, value in facts if value not in (None, {}, [])
    ]
    return f"{plugin.name} {plugin.version or '(version unknown)'}: {'; '.join((state + plugin.reason, *words))}"


def _fix_lines(problems: Sequence[Problem]) -> Iterator[str]:
    if not problems:
        yield "Nothing to fix."
        return
    yield "To fix"
    for number, problem in enumerate(problems, 1):
        yield f"  {number}. {problem.what}"
        yield f"     {problem.fix}"


def _format_value(value: object) -> str:
    """Return a fact, which is JSON, in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_format_value, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format_value(item)}" for name, item in value.items()) or "none"
    return "unknown" if value is None else str(value)


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"
