"""One rank's contribution to a negotiation: its request, settings, plugins and device, and the evidence of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from comm_core._control.deadline import describe
from comm_core._plan import decide
from comm_core._plugins import discovery
from comm_core._probe.rank import probe_rank
from comm_core.env import PREFIX, Settings
from comm_core.topology import Topology
from comm_core.types import Available, Unavailable

__all__ = [
    "FACTS_NBYTES",
    "LocalInputs",
    "Request",
    "answer_of",
    "device_types_of",
    "discover",
    "gather_local_inputs",
    "topology_of_one",
]

#: The longest facts of one plugin, as JSON text in bytes.
FACTS_NBYTES = 512
# The longest reason, in characters: those of all plugins must fit into one message.
_REASON_CHARS = 1000
# What a plugin without `is_available` answers; see the hook's spec.
_DEFAULT = Available(priority=500)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a caller asked of `get_backend`.

    Attributes:
        backends: names of backends; no others are tried. None: whatever is installed.
        timeout_s: for every exchange and every `connect`, in seconds; None: as the environment says.
    """

    backends: tuple[str, ...] | None = None
    timeout_s: float | None = None

    def __str__(self) -> str:
        return f"backends={self.backends!r}, timeout_s={self.timeout_s!r}"


@dataclasses.dataclass(frozen=True)
class LocalInputs:
    """What this rank brings along, and the evidence of it for the others.

    Attributes:
        request: the caller's.
        settings: the environment's; the defaults where that can't be read, which `evidence.error` then says.
        plugins: those that loaded, by name.
        device: of the group's tensors.
        evidence: what the other ranks are told.
    """

    request: Request
    settings: Settings
    plugins: Mapping[str, discovery.Plugin]
    device: torch.device
    evidence: decide.Evidence

    @property
    def control_timeout_s(self) -> float:
        """For one exchange, in seconds."""
        return self.request.timeout_s or self.settings.control_timeout_s

    @property
    def connect_timeout_s(self) -> float:
        """For one backend's `connect`, in seconds."""
        return self.request.timeout_s or self.settings.connect_timeout_s

    @property
    def wanted(self) -> tuple[tuple[str, ...] | None, str]:
        """The backends that alone may be tried, None for any; and what says so."""
        if self.request.backends is not None:
            return self.request.backends, "get_backend(backends=...)"
        return self.settings.backends, f"{PREFIX}BACKENDS"


def gather_local_inputs(group: dist.ProcessGroup, request: Request) -> LocalInputs:
    """What this rank knows. A failure becomes evidence: a rank that raised alone would leave the others waiting."""
    settings, found, error = Settings(), discovery.Discovery({}, {}, {}), None
    failures: dict[str, str] = {}
    facts: dict[str, Any] = {}
    device = torch.device("cpu")
    try:
        settings = Settings.read()
        found, failures = discover(settings, request.backends or settings.backends)
        facts, unusable = _facts(found.plugins)
        failures.update(unusable)
        device = _device_of(group)
    except Exception as raised:  # noqa: BLE001 - whatever it is, all ranks are told and raise together
        error = _short(describe(raised))
    info = probe_rank(dist.get_rank(), device, plugins=found.listed, facts=facts)
    policy = {
        "get_backend(backends=...)": request.backends,
        "get_backend(timeout_s=...)": request.timeout_s,
        **settings.shared(),
        "the process group's backend": dist.get_backend_config(group),
        "the kind of device": device.type,
    }
    return LocalInputs(request, settings, found.plugins, device, decide.Evidence(info, policy, failures, error))


def topology_of_one(group: dist.ProcessGroup | None) -> Topology:
    """The topology of a group of this rank alone; of this process, without a group."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    rank = dist.get_rank() if group is not None else 0
    info = probe_rank(rank, device, plugins={}, facts={})
    return Topology.of([info], ("cuda", "cpu") if cuda else ("cpu",))


def discover(settings: Settings, allowed: tuple[str, ...] | None) -> tuple[discovery.Discovery, dict[str, str]]:
    """The plugins that may be used, and why others can't be."""
    found = discovery.discover(
        lambda name: (allowed is None or name in allowed) and name not in settings.disable, settings.import_timeout_s
    )
    return found, {name: f"{_short(failure.reason)}. {failure.remedy}" for name, failure in found.failures.items()}


def _facts(plugins: Mapping[str, discovery.Plugin]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each plugin's `probe` says, and why some can't be used."""
    facts, unusable = {}, {}
    for name, plugin in plugins.items():
        if not plugin.has("probe"):
            continue
        try:
            found = plugin.hooks["probe"]()
            text = json.dumps(found, allow_nan=False)
            if not isinstance(found, dict) or len(text.encode()) > FACTS_NBYTES:
                raise ValueError(f"a JSON object of at most {FACTS_NBYTES} bytes is needed, not {text[:60]}")
            facts[name] = found
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the plugin border: also `SystemExit` puts only the plugin out
            unusable[name] = f"probe() failed: {_short(describe(error))}"
    return facts, unusable


def answer_of(plugin: discovery.Plugin, topology: Topology) -> Available | Unavailable:
    """What a plugin's `is_available` says of `topology`, its ranges made explicit; never raises."""
    answer: object = _DEFAULT
    if plugin.has("is_available"):
        try:
            answer = plugin.hooks["is_available"](topology)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the plugin border, as in `_facts`
            return Unavailable(f"is_available raised {_short(describe(error))}")
    if isinstance(answer, Available):
        return decide.with_explicit_ranges(answer, tuple(plugin.hooks))
    if isinstance(answer, Unavailable):
        return Unavailable(_short(answer.reason))
    return Unavailable(_short(f"is_available returned {answer!r}, neither Available nor Unavailable"))


def _short(reason: str) -> str:
    return reason if len(reason) <= _REASON_CHARS else reason[: _REASON_CHARS - 3] + "..."


def device_types_of(group: dist.ProcessGroup, device: torch.device) -> tuple[str, ...]:
    """What tensors the group reduces, the accelerator's first: the end of the route must take them too."""
    kinds = _backends(group)
    return tuple(kind for kind in ("cuda", "cpu") if kind in kinds and kind in ("cpu", device.type))


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """The device that the group's main tensors live on."""
    if "cuda" not in _backends(group) or not torch.cuda.is_available():
        return torch.device("cpu")
    bound: torch.device | None = group.bound_device_id
    return bound if bound is not None else torch.device("cuda", torch.cuda.current_device())


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    """The group's torch.distributed backend for each kind of device.

    Gloo takes CUDA tensors through the host. A group made with Gloo is an engine's group for CPU tensors: no
    accelerator's backend is set up beside it.
    """
    pairs = (part.split(":") for part in dist.get_backend_config(group).split(","))
    return {kind: backend for kind, backend in pairs if (kind, backend) != ("cuda", "gloo")}
