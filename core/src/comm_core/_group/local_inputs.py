"""One rank's inputs to a negotiation: request, settings, plugins, device, and the evidence for the other ranks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from comm_core._control.deadline import describe
from comm_core._control.worker import run_on_device
from comm_core._plan import decide
from comm_core._plugins import discovery
from comm_core._probe.rank import probe_rank
from comm_core._schema import load_json, printable, shorten
from comm_core.env import PREFIX, Settings, UnreadableSettingError, check_names, check_timeout_s, check_wire
from comm_core.topology import Topology
from comm_core.types import Available, Unavailable

__all__ = [
    "FACTS_NBYTES",
    "LocalInputs",
    "Request",
    "answers_of",
    "backends_of",
    "device_types_of",
    "discover",
    "gather_local_inputs",
    "other_device_types",
    "probe_plugins",
    "read_facts",
    "topology_of_one",
]

#: The limit on one plugin's facts, as JSON text in bytes.
FACTS_NBYTES = 512
# The deepest nesting of one plugin's facts: with the levels around them, they stay far below a message's limit.
_FACTS_DEPTH = 16
# The limit on one reason, as JSON in bytes. If the reasons of all plugins don't fit into one message, they get shorter.
_REASON_NBYTES = 1000
# The answer of a plugin without `is_available`; see the hook's spec.
_DEFAULT_ANSWER = Available(priority=500)


@dataclasses.dataclass(frozen=True)
class Request:
    """The caller's arguments to `get_backend`.

    Attributes:
        backends: names of backends; no others are tried. None: all installed backends.
        timeout_s: the deadline of every exchange and every `connect`, in seconds; None: the environment's.
        deterministic: whether the group is deterministic; None: the environment's.
        wire: the quantised wire, "" for none; None: the environment's.
    """

    backends: tuple[str, ...] | None = None
    timeout_s: float | None = None
    deterministic: bool | None = None
    wire: str | None = None

    @classmethod
    def of(
        cls,
        backends: Sequence[str] | None,
        timeout_s: float | None,
        deterministic: bool | None = None,
        wire: str | None = None,
    ) -> Request:
        """Check the arguments of `get_backend` and return them.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """
        if backends is not None:
            if isinstance(backends, str) or not backends:
                raise ValueError(f"backends={backends!r}: expected a sequence of one or more names")
            if not all(isinstance(name, str) for name in backends):
                raise TypeError(f"backends={backends!r}: expected names of backends, as strings")
            backends = tuple(sorted(set(backends)))  # their order has no meaning
        if timeout_s is not None:
            try:
                check_timeout_s(timeout_s)
            except (TypeError, ValueError) as error:
                raise type(error)(f"timeout_s={timeout_s!r}: {error}") from None
        if deterministic is not None and not isinstance(deterministic, bool):
            raise TypeError(f"deterministic={deterministic!r}: expected True, False or None")
        if wire is not None:
            check_wire(wire)
        return cls(backends, timeout_s, deterministic, wire)

    def __post_init__(self) -> None:
        if self.wire and self.deterministic:
            raise ValueError(
                f"a group is either deterministic or has the {self.wire} wire: bits of quantised sums depend on the "
                f"elements beside them. Both come from get_backend's arguments or, if these are None, from "
                f"{PREFIX}DETERMINISTIC and {PREFIX}WIRE"
            )

    def resolved(self, settings: Settings) -> Request:
        """Return the request with the environment's values where the caller gave none.

        Raises:
            ValueError: the values exclude each other.
        """
        deterministic = settings.deterministic if self.deterministic is None else self.deterministic
        wire = settings.wire if self.wire is None else self.wire
        return dataclasses.replace(self, deterministic=deterministic, wire=wire)

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True)
class LocalInputs:
    """This rank's inputs to a negotiation.

    Attributes:
        request: the caller's arguments.
        settings: the environment's settings; the defaults if they can't be read, with the reason in `evidence.error`.
        plugins: the loaded plugins, by name.
        device: the device of the group's main tensors.
        evidence: the report to the other ranks.
    """

    request: Request
    settings: Settings
    plugins: Mapping[str, discovery.Plugin]
    device: torch.device
    evidence: decide.Evidence

    @property
    def control_timeout_s(self) -> float:
        """The deadline of one exchange, in seconds."""
        return self.request.timeout_s or self.settings.control_timeout_s

    @property
    def connect_timeout_s(self) -> float:
        """The deadline of one backend's `connect`, in seconds."""
        return self.request.timeout_s or self.settings.connect_timeout_s

    @property
    def deterministic(self) -> bool:
        """Whether the group is deterministic."""
        return bool(self.request.resolved(self.settings).deterministic)

    @property
    def wire(self) -> str:
        """The quantised wire that the group asks for; "": none."""
        return self.request.resolved(self.settings).wire or ""

    @property
    def named_backends(self) -> tuple[tuple[str, ...] | None, str]:
        """The only backends to try, None for all installed ones; and the argument or variable that names them."""
        if self.request.backends is not None:
            return self.request.backends, "get_backend(backends=...)"
        return self.settings.backends, f"{PREFIX}BACKENDS"


def gather_local_inputs(group: dist.ProcessGroup, request: Request) -> LocalInputs:
    """Gather this rank's inputs; a failure becomes evidence, because a rank that raises alone leaves others waiting."""
    settings, found, error = Settings(), discovery.Discovery({}, {}, {}), None
    failures: dict[str, str] = {}
    facts: dict[str, Any] = {}
    device = torch.device("cpu")
    backends = None
    excerpt: tuple[str, ...] = ()
    try:
        settings = Settings.read()
        request.resolved(settings)
        # Sorted, like the environment's: the order has no meaning, so it mustn't count as a difference.
        backends = None if request.backends is None else check_names(request.backends)
        found, failures = discover(settings, request.backends or settings.backends)
        device = _device_of(group)
        if not device_types_of(group, device):
            raise RuntimeError(
                "torch sees no GPU, and the process group serves nothing but CUDA tensors (its backends: "
                f"{dist.get_backend_config(group)})"
            )
        timeout_s = request.timeout_s or settings.control_timeout_s
        facts, unusable = probe_plugins(found.plugins, device, timeout_s)
        failures.update(unusable)
    except UnreadableSettingError as raised:
        error, excerpt = _truncate(str(raised)), raised.excerpt
    except Exception as raised:  # noqa: BLE001 - any error goes to all ranks, which raise together
        error = _truncate(describe(raised))
    info = probe_rank(dist.get_rank(), device, plugins=found.listed, facts=facts)
    policy = {
        "get_backend(backends=...)": backends,
        "get_backend(timeout_s=...)": request.timeout_s,
        "get_backend(deterministic=...)": request.deterministic,
        "get_backend(wire=...)": request.wire,
        **settings.shared(),
        "the process group's backend": dist.get_backend_config(group),
        "the kind of device": device.type,
    }
    return LocalInputs(
        request, settings, found.plugins, device, decide.Evidence(info, policy, failures, error, excerpt)
    )


def topology_of_one(group: dist.ProcessGroup | None) -> Topology:
    """Return the topology of a group of one rank, or of this process if `group` is None."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    rank = dist.get_rank() if group is not None else 0
    info = probe_rank(rank, device, plugins={}, facts={})
    return Topology.of([info], ("cuda", "cpu") if cuda else ("cpu",))


def discover(settings: Settings, allowed: tuple[str, ...] | None) -> tuple[discovery.Discovery, dict[str, str]]:
    """Load the allowed plugins; return them, and for each that failed to load the reason."""
    found = discovery.discover(
        lambda name: (allowed is None or name in allowed) and settings.may_import(name),
        settings.import_timeout_s,
        settings.cache_dir,
    )
    return found, {name: f"{_truncate(failure.reason)}. {failure.remedy}" for name, failure in found.failures.items()}


class HookTimer:
    """Calls one Local hook of each plugin before an exchange, so that this rank comes to the exchange in time.

    All calls together get half of the exchange's deadline, and each an equal share of what is left: one that hangs
    leaves time to the others.

    Args:
        device: the device that the hooks find set.
        count: the number of calls.
        timeout_s: the deadline of the exchange, in seconds.
    """

    def __init__(self, device: torch.device, count: int, timeout_s: float) -> None:
        self._device = device
        self._count = count
        self._end = time.monotonic() + timeout_s / 2

    def run(self, call: Callable[[], Any], name: str) -> Any:
        """Call a hook in a thread; see `run_on_device`."""
        share_s = max(self._end - time.monotonic(), 0.0) / max(self._count, 1)
        self._count -= 1
        # Rounded for the error's text.
        return run_on_device(call, self._device, round(share_s, 2), name)


def probe_plugins(
    plugins: Mapping[str, discovery.Plugin], device: torch.device, timeout_s: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Call each plugin's `probe`; return the facts, and for each plugin that failed the reason."""
    facts, unusable = {}, {}
    probing = {name: plugin for name, plugin in plugins.items() if plugin.has("probe")}
    timer = HookTimer(device, len(probing), timeout_s)
    for name, plugin in probing.items():
        try:
            facts[name] = read_facts(timer.run(plugin.hooks["probe"], f"probe of {name}"))
        except Exception as error:  # noqa: BLE001, PERF203 - plugin boundary: any failure drops only the plugin
            unusable[name] = f"probe() failed: {_truncate(describe(error))}"
    return facts, unusable


def read_facts(found: Any) -> Any:
    """Return what a plugin's `probe` returned as the other ranks will read it.

    The result is a copy, which the plugin can't change any more.

    Raises:
        TypeError, ValueError: it isn't JSON, or exceeds a limit; also what an object's own methods raise.
    """
    text = json.dumps(found, allow_nan=False)
    if not isinstance(found, dict) or len(text) > FACTS_NBYTES:
        raise ValueError(f"expected a JSON object of at most {FACTS_NBYTES} bytes; got {text[:60]}")
    facts = load_json(text, depth=_FACTS_DEPTH)
    if json.dumps(facts) != text:
        raise ValueError("expected a JSON object with each name once")
    return facts


def answers_of(
    plugins: Sequence[discovery.Plugin], topology: Topology, device: torch.device, timeout_s: float
) -> dict[str, Available | Unavailable]:
    """Return each plugin's `is_available` answer for `topology`, by name, with explicit ranges; never raises.

    Args:
        plugins: the plugins.
        topology: the group's topology.
        device: the device that the hooks find set.
        timeout_s: the deadline of the exchange that follows, in seconds.
    """
    timer = HookTimer(device, sum(plugin.has("is_available") for plugin in plugins), timeout_s)
    return {plugin.name: _answer_of(plugin, topology, timer) for plugin in plugins}


def _answer_of(plugin: discovery.Plugin, topology: Topology, timer: HookTimer) -> Available | Unavailable:
    answer: object = _DEFAULT_ANSWER
    try:
        if plugin.has("is_available"):
            # A copy: facts are dicts, and other plugins read them after this one.
            call = functools.partial(plugin.hooks["is_available"], copy.deepcopy(topology))
            answer = timer.run(call, f"is_available of {plugin.name}")
        if isinstance(answer, Available):
            return decide.with_explicit_ranges(answer, tuple(plugin.hooks))
        if isinstance(answer, Unavailable):
            return Unavailable(_truncate(answer.reason))
        return Unavailable(_truncate(f"is_available returned {answer!r}, neither Available nor Unavailable"))
    except Exception as error:  # noqa: BLE001 - plugin boundary, as in `probe_plugins`; also an answer's own methods
        return Unavailable(f"is_available raised {_truncate(describe(error))}")


def _truncate(reason: str) -> str:
    return shorten(printable(reason), _REASON_NBYTES)


def device_types_of(group: dist.ProcessGroup, device: torch.device) -> tuple[str, ...]:
    """Return the device types that the group's fallback can reduce, the accelerator's first."""
    kinds = _torch_backends(group)
    return tuple(kind for kind in ("cuda", "cpu") if kind in kinds and kind in ("cpu", device.type))


def other_device_types(group: dist.ProcessGroup, routed: Sequence[str]) -> tuple[str, ...]:
    """Return the device types that torch.distributed alone serves in this group, such as CUDA by Gloo."""
    return tuple(kind for kind in backends_of(group) if kind not in routed)


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """Return the name of the group's torch.distributed backend for each device type."""
    pairs = (part.partition(":") for part in dist.get_backend_config(group).split(","))
    return {kind: backend for kind, _, backend in pairs}


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Return the device of the group's main tensors."""
    if "cuda" not in _torch_backends(group) or not torch.cuda.is_available():
        return torch.device("cpu")
    bound: torch.device | None = group.bound_device_id
    return bound if bound is not None else torch.device("cuda", torch.cuda.current_device())


def _torch_backends(group: dist.ProcessGroup) -> dict[str, str]:
    """Return the group's torch.distributed backend for each device type, without Gloo for CUDA.

    Gloo copies CUDA tensors through the host. An engine makes a Gloo group for CPU tensors, so it gets no CUDA routes.
    """
    return {kind: backend for kind, backend in backends_of(group).items() if (kind, backend) != ("cuda", "gloo")}
