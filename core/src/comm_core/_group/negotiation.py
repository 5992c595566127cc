"""One group's negotiation, step by step: probe, exchange, ask, decide, connect and admit.

Every rank runs the same steps, since each step follows from what all ranks exchanged in the one before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from comm_core._control.channel import SessionChannel
from comm_core._control.deadline import describe
from comm_core._control.stage import Stage
from comm_core._control.store import Control
from comm_core._group.connect import Member, establish
from comm_core._handle.session import Session
from comm_core._plan import decide
from comm_core._plan.decide import Slate
from comm_core._plugins import discovery
from comm_core._probe.rank import probe_rank
from comm_core.context import GroupContext, Shapes
from comm_core.env import PREFIX, Settings
from comm_core.errors import BackendUnavailableError
from comm_core.topology import Topology
from comm_core.types import TERMINAL, Available, Candidate, Decision, Unavailable

__all__ = ["FACTS_NBYTES", "Agreed", "Local", "Request", "agree", "foresee", "gather_local"]

_log = logging.getLogger("comm_core")
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
class Local:
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


@dataclasses.dataclass(frozen=True)
class Agreed:
    """How a negotiation ended.

    Attributes:
        topology: what the ranks reported.
        decision: what they agreed on.
        sessions: this rank's connected backends, by name.
        slate: what the decision follows from.
        plugins: this rank's plugins, by name.
        member: this rank in the group.
        prepared: what `comm.pre_capture_init` has prepared the backends for.
        kept_nbytes: of the memory budget, what backends hold that were in use and serve nothing any more.
    """

    topology: Topology
    decision: Decision
    sessions: dict[str, Session]
    slate: Slate
    plugins: Mapping[str, discovery.Plugin]
    member: Member
    prepared: tuple[Shapes, ...] = ()
    kept_nbytes: int = 0

    @classmethod
    def of(
        cls, slate: Slate, sessions: dict[str, Session], plugins: Mapping[str, discovery.Plugin], member: Member
    ) -> Agreed:
        """What follows from a slate and its sessions."""
        notes = {name: session.describe_wrong() for name, session in sessions.items() if session.wrong}
        decision = slate.decision(member.topology.device_types, notes)
        return cls(member.topology, decision, sessions, slate, plugins, member)


def gather_local(group: dist.ProcessGroup, request: Request) -> Local:
    """What this rank knows. A failure becomes evidence: a rank that raised alone would leave the others waiting."""
    settings, found, error = Settings(), discovery.Discovery({}, {}, {}), None
    failures: dict[str, str] = {}
    facts: dict[str, Any] = {}
    device = torch.device("cpu")
    try:
        settings = Settings.read()
        found, failures = _discover(settings, request.backends or settings.backends)
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
    return Local(request, settings, found.plugins, device, decide.Evidence(info, policy, failures, error))


def agree(group: dist.ProcessGroup, title: str, control: Control, local: Local) -> Agreed:
    """Negotiate. Collective; ends alike on every rank.

    Args:
        group: the process group.
        title: names it.
        control: its control channel, in a new incarnation.
        local: what this rank brings along.

    Raises:
        NegotiationError: the ranks' settings differ, or one can't negotiate.
        BackendUnavailableError: a backend that the caller named can't serve.
        StageAbortedError: a rank failed or didn't come.
    """
    with Stage(control, "probe") as stage:
        evidence = [decide.Evidence.from_json(item) for item in stage.all_gather(local.evidence.to_json())]
    decide.check_policies(evidence, control.label)
    topology = Topology.of((item.info for item in evidence), _device_types(group, local.device))

    wanted, source = local.wanted
    asked, dropped = decide.nominate(evidence, wanted, local.settings.disable, source)
    slate = Slate((), dropped)
    if asked:
        mine = {name: decide.encode_answer(_answer(local.plugins[name], topology)) for name in asked}
        with Stage(control, "ask") as stage:
            slate = decide.slate(asked, stage.all_gather(mine), dropped)

    member = _member(group, topology, control, local)
    slate, sessions = establish(slate, local.plugins, member)
    agreed = Agreed.of(slate, sessions, local.plugins, member)
    _report(agreed, title, control, local, broken={name for item in evidence for name in item.failures})
    return agreed


def foresee(topology: Topology) -> Decision:
    """What the backends installed here would say of `topology`. Local; connects nothing, so nothing can fail yet.

    Raises:
        ValueError: a setting of the environment can't be read.
    """
    settings = Settings.read()
    found, failures = _discover(settings, settings.backends)
    here = dataclasses.replace(topology.ranks[0], plugins=found.listed)
    asked, dropped = decide.nominate(
        [decide.Evidence(here, failures=failures)], settings.backends, settings.disable, f"{PREFIX}BACKENDS"
    )
    answers = {name: decide.encode_answer(_answer(found.plugins[name], topology)) for name in asked}
    return decide.slate(asked, [answers], dropped).decision(topology.device_types)


def _member(group: dist.ProcessGroup, topology: Topology, control: Control, local: Local) -> Member:
    context = GroupContext(
        group=group,
        rank=control.rank,
        world_size=control.world_size,
        device=local.device,
        global_ranks=control.global_ranks,
        control=SessionChannel(),
        memory_budget_nbytes=local.settings.memory_budget_nbytes,
        wait_timeout_s=local.settings.wait_timeout_s,
    )
    return Member(context, topology, control, local.connect_timeout_s)


# What this process has said of plugins that are broken or missed: once, in however many groups.
_said: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)


def _report(agreed: Agreed, title: str, control: Control, local: Local, broken: set[str]) -> None:
    """Raise where a backend that the caller named can't serve; log the outcome, once a group."""
    wanted, source = local.wanted
    lost = [
        candidate
        for candidate in agreed.decision.candidates
        if candidate.name in (wanted or ()) and candidate.verdict not in ("serves", "standby")
    ]
    if lost and local.request.backends is not None:
        for session in agreed.sessions.values():
            session.close(orderly=False)
        others = "".join(f"; neither can {other.name!r}: {_reason(other, control)}" for other in lost[1:])
        raise BackendUnavailableError(
            f"backend {lost[0].name!r} was named for {title} but can't serve it: {_reason(lost[0], control)}{others}. "
            f"No other is tried, because {source} names it. Leave it out to negotiate, or see: comm-core explain"
        )
    if control.rank != 0:
        return
    for candidate in lost:
        _log.warning(
            "%s names %r, which can't serve %s: %s. Falling back",
            source,
            candidate.name,
            title,
            _reason(candidate, control),
        )
    for name in local.settings.disable:
        if name != TERMINAL and name not in {*local.evidence.info.plugins, *local.evidence.failures}:
            # A switch that does nothing is most likely a name that is misspelt.
            _warn_once(f"{PREFIX}DISABLE names {name!r}, which isn't installed here")
    for candidate in agreed.decision.candidates:
        if candidate.name in broken and candidate.verdict == "unavailable":
            _warn_once(f"backend {candidate.name!r} can't be used: {_reason(candidate, control)}")
        # It said that it could serve: the group is slower than it should be, and nothing else shows that.
        if candidate.verdict == "failed" and candidate not in lost:
            why = _reason(candidate, control)
            _log.warning("backend %r failed for %s: %s. Falling back", candidate.name, title, why)
    rules = agreed.decision.route("all_reduce", "eager", agreed.topology.device_types[0], "float32").rules
    _log.info("%s: all-reduce by %s", title, ", then ".join(dict.fromkeys(rule.backend for rule in rules)))


def _reason(candidate: Candidate, control: Control) -> str:
    if candidate.rank is None:
        return candidate.reason
    return f"{control.label(candidate.rank)}: {candidate.reason}"


def _discover(settings: Settings, allowed: tuple[str, ...] | None) -> tuple[discovery.Discovery, dict[str, str]]:
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


def _answer(plugin: discovery.Plugin, topology: Topology) -> Available | Unavailable:
    answer: object = _DEFAULT
    if plugin.has("is_available"):
        try:
            answer = plugin.hooks["is_available"](topology)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - the plugin border, as in `_facts`
            return Unavailable(f"is_available raised {_short(describe(error))}")
    if isinstance(answer, Available):
        return decide.implied(answer, tuple(plugin.hooks))
    if isinstance(answer, Unavailable):
        return Unavailable(_short(answer.reason))
    return Unavailable(_short(f"is_available returned {answer!r}, neither Available nor Unavailable"))


def _short(reason: str) -> str:
    return reason if len(reason) <= _REASON_CHARS else reason[: _REASON_CHARS - 3] + "..."


def _device_types(group: dist.ProcessGroup, device: torch.device) -> tuple[str, ...]:
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
