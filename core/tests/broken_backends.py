"""Backends that break one rule each, by name: the source of the fault, and the standard tests that must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

__all__ = ["BROKEN", "Broken", "source_of"]

_TEMPLATE = """
import contextlib, mmap, os, threading, time
import torch, torch.distributed as dist
import comm_core as comm

NBYTES = {nbytes}
LAST, TURNS, GROUPS, KEPT = [None], [0], [0], []

def sent_as_fp8(session, x, changed=lambda x: x):
    if not session.wire or x.dtype is not torch.float32 or x.nbytes < 1 << 10:
        return x
    chunks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 128)).view(-1, 128)
    exponents = torch.frexp(chunks.abs().nan_to_num(nan=0).amax(1, keepdim=True))[1] - 8
    values = torch.ldexp(chunks, -exponents).to(torch.float8_e4m3fn)
    return changed(torch.ldexp(values.float(), exponents).view(-1)[: x.numel()]).view_as(x)

class Session:
    calls = prepared = 0
    lost = capturing = False
    variant = "one"

    def __init__(self, context):
        self.context, self.group, self.rank, self.wire = context, context.group, context.rank, context.wire

    def sent(self, x):
        return x

class Padded:
    wire = ""

    def __init__(self, session, num_tokens):
        self.session, self.num_tokens = session, num_tokens

    def __getattr__(self, name):
        return getattr(self.session, name)

    def sent(self, x):
        return x.view(-1, x.shape[-1])[:max(1, self.num_tokens)]

class Plugin:
    COMM_HOOK_API = (1, 0)

    @comm.hookimpl
    def is_available(self, topology):
        priority, dtypes = 500, ("float32", "int32")
        ranges = [comm.Range("all_reduce", dtypes=dtypes, device_types=("cpu",), max_nbytes=NBYTES)]
        if hasattr(self, "all_reduce_add_rms_norm"):
            ranges += [comm.Range("all_reduce_add_rms_norm", dtypes=("float32",), max_nbytes=1 << 17)]
        {available}
        return comm.Available(priority, ranges)

    @comm.hookimpl
    def connect(self, topology, context):
        session = Session(context)
        {connect}
        return session

    @comm.hookimpl
    def all_reduce(self, session, tensor, out):
        {before}
        x = tensor.clone()
        start = time.monotonic()
        dist.all_reduce(session.sent(x), group=session.group)
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
        also: further tests that must fail; run by SOAK_KIT=1.
        available, connect, before, all_reduce, prepare: the fault's line in a hook; `before` comes before the sum.
        slow: whether a test takes more than ten seconds to find it.
        nbytes: the largest message that the backend serves, in bytes.
        hooks: further hooks.
    """

    tests: frozenset[str]
    available: str = "pass"
    connect: str = "pass"
    before: str = "pass"
    all_reduce: str = "pass"
    prepare: str = "pass"
    nbytes: int = 4 << 10
    hooks: str = ""
    slow: bool = False
    also: frozenset[str] = frozenset()


def _broken(*tests: str, nbytes: int = 4 << 10, slow: bool = False, also: Iterable[str] = (), **lines: str) -> Broken:
    return Broken(frozenset(tests), nbytes=nbytes, slow=slow, also=frozenset(also), **lines)


def _over_a_wire(sums: str = "x") -> dict[str, str]:
    """Return the lines of a backend whose wire changes the sums `x` to what the expression says."""
    return {
        "available": "ranges += [comm.Range('all_reduce', None, ('float32',), ('cpu',), 1 << 10, NBYTES, wire='fp8')]",
        "before": "tensor = sent_as_fp8(session, tensor)",
        "all_reduce": f"x = sent_as_fp8(session, x, lambda x: {sums})",
    }


SERVES, ANSWERS = "it_serves_a_group_or_says_why_not", "it_answers_validly_about_every_topology"
LEFT = "closed_groups_leave_nothing"
KEPT = "inputs_are_kept_and_only_outputs_written"
MANY = "many_calls_in_a_row_are_right"
SUMS, INTEGERS = "sums_are_as_near_as_rounding_allows", "integers_are_summed_exactly"
CAPTURED, CAPTURE_FAILS = "captured_calls_are_replayed", "a_capture_that_fails_on_one_rank_is_forgotten"
FUSED = "fused_calls_are_right"
PADDED = "padded_batches_are_summed"
CONNECT_FAILS = "a_fault_in_connect_is_agreed_and_leaves_nothing"
CALL_RAISES, CALL_MISSING = "a_call_that_raises_on_one_rank_ends_the_others_calls", "a_call_without_one_rank_ends"
PREPARING_FAILS = "a_fault_in_preparation_is_agreed_and_leaves_nothing"
VARIANTS = "variants_give_the_same_bits"
SUSPENSION_FAILS = "a_fault_in_suspension_stops_the_handle"
WIRE = "sums_over_a_wire_are_within_its_bound"
# Changes what isn't an integer: the admission test sums integers.
_FRACTIONS = "x = torch.where(x != x.round(), {}, x) if x.is_floating_point() else x"
_SUSPEND = """
    @comm.hookimpl
    def suspend(self, session):
        {}

    @comm.hookimpl
    def resume(self, session):
        {}
"""
_FUSED = """
    @comm.hookimpl
    def all_reduce_add_rms_norm(self, session, tensor, residual, weight, eps, weight_offset, out, residual_out):
        x = tensor.clone()
        dist.all_reduce(session.sent(x), group=session.group)
        s = x + residual
        w = weight + weight_offset
        {}
        y = (s.double() * torch.rsqrt(s.double().square().mean(-1, keepdim=True) + eps) * w.double()).to(x.dtype)
        return (y if out is None else out.copy_(y)), (s if residual_out is None else residual_out.copy_(s))
"""
_CAPTURE = """
    @comm.hookimpl
    @contextlib.contextmanager
    def capture_ctx(self, session):
        {}
        session.capturing = True
        yield
        session.capturing = False
"""
_PADDED = """
    @comm.hookimpl
    def padded_session(self, session, num_tokens):
        return Padded(session, {})
"""
_CLOSE = """
    @comm.hookimpl
    def close(self, session, orderly):
        {}
"""
_VARIANTS = """
    @comm.hookimpl
    def variants(self, session, op, nbytes, num_tokens):
        return [session.variant, "one", "other"]

    @comm.hookimpl
    def use_variants(self, session, choices):
        for choice in choices:
            {}
        session.variant = choices[0].variant if choices else "one"
"""
_KNOWN = "if choice.variant not in ('one', 'other'): raise ValueError(choice.variant)"
_THREAD = "session.ends = threading.Event(); threading.Thread(target=session.ends.wait, daemon=True).start()"
_OPEN = "session.file = os.open('/dev/null', os.O_RDONLY)"

SOUND = Broken(
    frozenset(),
    **_over_a_wire(),
    connect=_OPEN,
    hooks=_FUSED.format("pass")
    + _CAPTURE.format("pass").replace("yield", "try: yield\n        finally: session.capturing = False")
    + _CLOSE.format("os.close(session.file)")
    + _SUSPEND.format("pass", "pass")
    + _VARIANTS.format(_KNOWN)
    + _PADDED.format("num_tokens"),
)
"""A backend without a fault, with all hooks that the faults need."""

FUSED_ALONE = Broken(
    frozenset(),
    available="return comm.Available(500, [comm.Range('all_reduce_add_rms_norm', dtypes=('bfloat16',),"
    " prepared=True)])",
    prepare="return [comm.Range('all_reduce_add_rms_norm', dtypes=('bfloat16',), max_tokens=shapes.max_tokens,"
    " hidden_multiple=shapes.hidden_size, prepared=True)] if shapes.dtype is torch.bfloat16 else None",
    hooks=_FUSED.format("pass"),
)
"""A backend without a fault that serves only the fused operation, and only once it is prepared."""

BROKEN = {
    "answers_by_chance": _broken(ANSWERS, available="priority += time.monotonic_ns() % 1_000_003"),
    "expects_two_ranks": _broken(ANSWERS, available="topology.ranks[1]"),
    "has_another_signature": _broken(ANSWERS, hooks=_CLOSE.format("pass").replace("orderly", "force")),
    "wrong_beyond_2_gib": _broken(
        "messages_beyond_2_gib_are_summed",
        nbytes=3 << 30,
        slow=True,
        before="if tensor.nbytes > 2 << 30: return tensor.clone()",
    ),
    "exchanges_in_a_capture": _broken(
        CAPTURED, CAPTURE_FAILS, slow=True, hooks=_CAPTURE.format("session.context.control.barrier()")
    ),
    "keeps_a_failed_capture": _broken(
        CAPTURE_FAILS, hooks=_CAPTURE.format("if session.capturing: raise RuntimeError('a capture is open')")
    ),
    "forgets_the_weights_offset": _broken(FUSED, hooks=_FUSED.format("w = weight")),
    "changes_the_residual": _broken(FUSED, hooks=_FUSED.format("if len(x) == 3: residual.copy_(s)")),
    "reads_the_number_of_tokens_once": _broken(PADDED, hooks=_PADDED.format("num_tokens.clone()")),
    "sends_padded_batches_over_the_wire": _broken(
        PADDED,
        **{**_over_a_wire(), "before": "tensor = sent_as_fp8(getattr(session, 'session', session), tensor)"},
        hooks=_PADDED.format("num_tokens"),
    ),
    "wrong_at_sixteen_tokens": _broken(FUSED, hooks=_FUSED.format("if len(x) == 16: s[-1, -1] += 1")),
    "keeps_a_descriptor_if_a_peer_fails": _broken(
        CONNECT_FAILS, connect="file = os.dup(0); context.control.barrier(); os.close(file)"
    ),
    "keeps_a_thread_after_a_failed_call": _broken(
        CALL_RAISES, CALL_MISSING, slow=True, connect=_THREAD, hooks=_CLOSE.format("if orderly: session.ends.set()")
    ),
    "keeps_a_descriptor_if_a_peer_fails_to_prepare": _broken(
        PREPARING_FAILS, prepare="file = os.dup(0); session.context.control.barrier(); os.close(file)"
    ),
    "keeps_a_thread_if_suspended": _broken(
        SUSPENSION_FAILS,
        connect=_THREAD,
        hooks=_CLOSE.format("if not session.lost: session.ends.set()")
        + _SUSPEND.format("session.lost = True", "session.lost = False"),
    ),
    "other_bits_by_a_variant": _broken(
        VARIANTS,
        all_reduce="if session.variant == 'other': " + _FRACTIONS.format("x * (1 + 1.2e-7)"),
        hooks=_VARIANTS.format(_KNOWN),
    ),
    "takes_any_text_for_a_variant": _broken(VARIANTS, hooks=_VARIANTS.format("pass")),
    # The admission test sums integers.
    "beyond_the_wires_bound_at_some_places": _broken(
        WIRE, **_over_a_wire("torch.where((x != x.round()) & (torch.arange(len(x)) % 97 == 0), 1.5 * x, x)")
    ),
    "other_bits_on_other_ranks_over_a_wire": _broken(WIRE, **_over_a_wire("x * (1 + 2**-20 * session.rank)")),
    "spreads_nans_over_a_wire": _broken(WIRE, **_over_a_wire("x + 0 * x.sum()")),
    "raises_in_close": _broken(LEFT, hooks=_CLOSE.format("raise RuntimeError('not now')")),
    "hangs_in_close": _broken(
        LEFT,
        slow=True,
        also=(CONNECT_FAILS, PREPARING_FAILS),
        hooks=_CLOSE.format("GROUPS[0] += 1; GROUPS[0] == 5 and threading.Event().wait(60)"),
    ),
    "keeps_the_state_of_earlier_groups": _broken(LEFT, connect="GROUPS[0] += 1", all_reduce="if GROUPS[0] > 8: x += 1"),
    "wrong_on_one_rank": _broken(SERVES, all_reduce="x.view(-1)[-1] += session.rank"),
    "zeroes_odd_tails": _broken(SERVES, nbytes=1 << 20, all_reduce="if numel > 4096 and numel % 2: x.view(-1)[-1] = 0"),
    "raises_in_connect": _broken(SERVES, connect="if session.rank: raise RuntimeError('no room on this rank')"),
    "rounds_too_early": _broken(SERVES, all_reduce="x = x.bfloat16().to(x.dtype) if x.is_floating_point() else x"),
    "loses_precision": _broken(SUMS, all_reduce=_FRACTIONS.format("x * (1 + 2e-6)")),
    # The largest message but one: the admission test sums the largest.
    "off_by_one_at_one_size": _broken(
        INTEGERS, slow=True, nbytes=300_012, all_reduce="if numel == 75_002: x.view(-1)[-1] = tensor.view(-1)[-1]"
    ),
    "refuses_a_size_in_its_range": _broken(
        INTEGERS, nbytes=300_012, all_reduce="if numel == 75_002: raise ValueError('not this size')"
    ),
    "changes_its_input": _broken(KEPT, all_reduce="if out is None and 100 < numel < 1000: tensor.copy_(x)"),
    "returns_its_input": _broken(KEPT, all_reduce="if out is None and 100 < numel < 1000: x = tensor.copy_(x)"),
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
    "sums_otherwise_than_it_says": _broken(
        "sums_have_the_bits_that_numerics_promise",
        available="return comm.Available(priority, ranges, numerics='rank_order_fp32')",
        all_reduce=_FRACTIONS.format("x * (1 + 1.2e-7)"),
    ),
    "wrong_after_300_calls": _broken(MANY, all_reduce="if session.calls > 300: x.zero_()"),
    "impatient": _broken(
        "a_rank_that_comes_late_is_waited_for",
        slow=True,
        all_reduce="if waited_s > 1.2: raise RuntimeError('too late')",
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
    "keeps_a_thread": _broken(
        LEFT,
        also=(CONNECT_FAILS, PREPARING_FAILS, CALL_RAISES, CALL_MISSING),
        connect="threading.Thread(target=threading.Event().wait, daemon=True).start()",
    ),
    "keeps_a_mapping": _broken(LEFT, also=(CONNECT_FAILS, PREPARING_FAILS), connect="KEPT.append(mmap.mmap(-1, 4096))"),
    "loses_its_state_in_suspension": _broken(
        "suspended_groups_resume",
        all_reduce="if session.lost: x.zero_()",
        hooks=_SUSPEND.format("pass", "session.lost = True"),
    ),
}


def source_of(broken: Broken) -> str:
    """Return the source of a module with the backend."""
    fields = {field.name: getattr(broken, field.name) for field in dataclasses.fields(broken)}
    return _TEMPLATE.format(**{**fields, "hooks": broken.hooks.strip()})
