"""Backends that break one rule each, by name: the source of the fault, and the standard tests that must fail."""

from __future__ import annotations

import dataclasses

__all__ = ["BROKEN", "Broken", "source_of"]

_TEMPLATE = """
import mmap, os, threading, time
import torch, torch.distributed as dist
import comm_core as comm

NBYTES = {nbytes}

class Session:
    def __init__(self, context):
        self.context, self.group, self.rank = context, context.group, context.rank
        self.calls = self.prepared = 0
        self.lost = False

LAST, TURNS, KEPT = [None], [0], []

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def is_available(self, topology):
        dtypes = ("float32", "int32")
        return comm.Available(500, (comm.Range("all_reduce", dtypes=dtypes, device_types=("cpu",), max_nbytes=NBYTES),))

    @comm.hookimpl
    def connect(self, topology, context):
        session = Session(context)
        {connect}
        return session

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        x = tensor.clone()
        start = time.monotonic()
        dist.all_reduce(x, group=session.group)
        waited_s = time.monotonic() - start
        numel, session.calls = x.numel(), session.calls + 1
        {all_reduce}
        return x if out is None else out.copy_(x)

    @comm.hookimpl
    def pre_capture_init(self, session, shapes):
        session.prepared += 1
        {prepare}

    {hooks}

plugin = Plugin()
"""


@dataclasses.dataclass(frozen=True)
class Broken:
    """One fault.

    Attributes:
        tests: the standard tests that must fail, without `test_`; all others must pass.
        all_reduce, connect, prepare: the fault's line in a hook.
        nbytes: the largest message that the backend serves, in bytes.
        hooks: further hooks.
    """

    tests: frozenset[str]
    all_reduce: str = "pass"
    connect: str = "pass"
    prepare: str = "pass"
    nbytes: int = 4 << 10
    hooks: str = ""


def _broken(*tests: str, nbytes: int = 4 << 10, **lines: str) -> Broken:
    return Broken(frozenset(tests), nbytes=nbytes, **lines)


SERVES, LEFT = "it_serves_a_group_or_says_why_not", "closed_groups_leave_nothing"
KEPT = "inputs_are_kept_and_only_outputs_written"
MANY = "many_calls_in_a_row_are_right"
SUMS, INTEGERS = "sums_are_as_near_as_rounding_allows", "integers_are_summed_exactly"
# Changes what isn't an integer: the admission test sums integers.
_FRACTIONS = "x = torch.where(x != x.round(), {}, x) if x.is_floating_point() else x"
_SUSPEND = """
    @comm.hookimpl
    def suspend(self, session):
        pass

    @comm.hookimpl
    def resume(self, session):
        session.lost = True
"""

BROKEN = {
    "wrong_on_one_rank": _broken(SERVES, all_reduce="x.view(-1)[-1] += session.rank"),
    "raises_in_connect": _broken(SERVES, connect="if session.rank: raise RuntimeError('no room on this rank')"),
    "rounds_too_early": _broken(SERVES, all_reduce="x = x.bfloat16().to(x.dtype) if x.is_floating_point() else x"),
    "loses_precision": _broken(SUMS, all_reduce=_FRACTIONS.format("x * (1 + 2e-6)")),
    # The largest message but one: the admission test sums the largest.
    "off_by_one_at_one_size": _broken(
        INTEGERS, nbytes=300_008, all_reduce="if numel == 75_001: x.view(-1)[-1] = tensor.view(-1)[-1]"
    ),
    "refuses_a_size_in_its_range": _broken(
        INTEGERS, nbytes=300_008, all_reduce="if numel == 75_001: raise ValueError('an odd size')"
    ),
    "changes_its_input": _broken(KEPT, all_reduce="if out is None and 1 < numel < 1000: tensor.copy_(x)"),
    "returns_its_input": _broken(KEPT, all_reduce="if out is None and 1 < numel < 1000: x = tensor.copy_(x)"),
    "writes_behind_its_output": _broken(
        KEPT,
        all_reduce="if out is not None and out.untyped_storage().nbytes() > out.nbytes + 8: "
        "out.as_strided((numel + 1,), (1,))[-1] = 0",
    ),
    "other_bits_in_a_rerun": _broken(
        "a_rerun_gives_the_same_bits",
        connect="session.seed = context.control.all_gather(time.monotonic_ns() % 1_000_003)[0]",
        all_reduce=_FRACTIONS.format(
            "x * (1 + 1.2e-7 * ((torch.arange(1, numel + 1) * session.seed >> 6) % 2).view(x.shape))"
        ),
    ),
    "other_bits_on_other_ranks": _broken(
        "all_ranks_get_the_same_bits", all_reduce=_FRACTIONS.format("x * (1 + 1.2e-7 * session.rank)")
    ),
    "wrong_after_300_calls": _broken(MANY, all_reduce="if session.calls > 300: x.zero_()"),
    "impatient": _broken(
        "a_rank_that_comes_late_is_waited_for", all_reduce="if waited_s > 0.4: raise RuntimeError('too late')"
    ),
    "mixes_groups": _broken(
        "two_groups_dont_mix",
        all_reduce="TURNS[0] += LAST[0] is not session; LAST[0] = session; x += TURNS[0] > 20",
    ),
    "takes_the_jobs_rank_for_the_groups": _broken(
        "sub_groups_are_served", connect="assert context.rank == dist.get_rank(), 'this is no such rank'"
    ),
    "prepares_once": _broken(
        "preparing_again_and_for_larger_shapes_works",
        prepare="if session.prepared > 1: raise RuntimeError('prepared already')",
    ),
    "keeps_a_descriptor": _broken(LEFT, connect="os.open('/dev/null', os.O_RDONLY)"),
    "keeps_a_thread": _broken(LEFT, connect="threading.Thread(target=threading.Event().wait, daemon=True).start()"),
    "keeps_a_mapping": _broken(LEFT, connect="KEPT.append(mmap.mmap(-1, 4096))"),
    "loses_its_state_in_suspension": _broken(
        "suspended_groups_resume", all_reduce="if session.lost: x.zero_()", hooks=_SUSPEND
    ),
}


def source_of(broken: Broken) -> str:
    """Return the source of a module with the backend."""
    fields = {field.name: getattr(broken, field.name) for field in dataclasses.fields(broken)}
    return _TEMPLATE.format(**{**fields, "hooks": broken.hooks.strip()})
