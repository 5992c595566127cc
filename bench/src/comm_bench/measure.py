"""The measurement: contenders take turns, and each repetition counts with the slowest rank's time."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from comm_core import env

from comm_bench.cases import BenchCase, calls_for
from comm_bench.chains import Chain, Check, Spacer, initial_state
from comm_bench.contenders import Absent, Contender, Job, Recorder

__all__ = ["Measured", "Procedure", "measure"]

# Runs of the untimed check, each with new inputs.
_CHECKS = 3
# Numbers of copies and of spacers that are timed together to get the time of one.
_COPIES = 16
_SPACERS = 200


@dataclasses.dataclass(frozen=True)
class Procedure:
    """Settings of the measurement.

    Attributes:
        calls: the number of calls in a chain; None: from `calls_for`.
        launches: the number of chains, or replays of a graph, that are timed together.
        warmup: the number of calls before recording and timing.
        repetitions: the number of times that each contender is timed.
        checks: whether results are compared.
    """

    calls: int | None
    launches: int
    warmup: int
    repetitions: int
    checks: bool


@dataclasses.dataclass(frozen=True)
class Measured:
    """A contender's result for one case, equal on every rank.

    Attributes:
        contender: the measured contender.
        case: the measured case.
        calls: the number of calls in a chain.
        restarts: the number of restarts in a chain.
        copy_us: the time of one restart, already subtracted; 0 without restarts.
        spacer_us: the time of one spacer, already subtracted; 0 without spacers.
        times_us: the slowest rank's time of one call, by repetition.
        wrong: the number of wrong elements on all ranks together; None if nothing was compared.
    """

    contender: Contender
    case: BenchCase
    calls: int
    restarts: int
    copy_us: float
    spacer_us: float
    times_us: tuple[float, ...]
    wrong: int | None


@dataclasses.dataclass
class _Timed:
    """One of the launches that are timed in turns.

    Attributes:
        name: a name for messages.
        launch: the function to time.
        calls: the number of calls in one launch.
        chain: the chain that `launch` runs, if any.
        select: called before the launches of a repetition.
        wrong: the number of this rank's wrong elements so far; None without a check.
        seconds: the time of one launch on this rank, by repetition.
    """

    name: str
    launch: Callable[[], object]
    calls: int
    chain: Chain | None = None
    select: Callable[[], object] = lambda: None
    wrong: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


def measure(
    job: Job, case: BenchCase, contenders: Sequence[Contender], procedure: Procedure, absent: Callable[[str, str], None]
) -> list[Measured]:
    """Time every contender that supports the case, in turns. Collective.

    Args:
        job: the ranks.
        case: the case to measure.
        contenders: the same on every rank, in the same order.
        procedure: the settings.
        absent: called with the name of a contender that fails in this case, and the reason.
    """
    deadlines = env.Settings.read()
    ready: dict[Contender, _Timed] = {}
    for contender in contenders:
        if contender.supports(case):
            try:
                # This deadline, because the contender may build its kernels now.
                with job.watchdog.step(f"{contender.name} in {case}, before it is timed", deadlines.connect_timeout_s):
                    ready[contender] = _prepare(contender, case, job, procedure)
            except Absent as reason:
                absent(contender.name, str(reason))
                contender.note_failure(job)
    copies, spacers = _copies(case, job), _spacers(case, job)
    everyone = [copies, spacers, *ready.values()]
    for repetition in range(procedure.repetitions):
        # The first in one repetition is the last in the next.
        turn = repetition % len(everyone)
        for timed in everyone[turn:] + everyone[:turn]:
            with job.watchdog.step(f"{timed.name} in {case}", deadlines.wait_timeout_s):
                timed.select()
                timed.seconds.append(_time(job, timed.launch, procedure.launches))
            if timed.chain is not None and timed.wrong is not None and repetition == procedure.repetitions - 1:
                # Compare at once, because another contender of the same library may use the same memory.
                timed.wrong += timed.chain.count_wrong(timed.calls)
    copy, spacer = (statistics.median(timed.seconds) / timed.calls for timed in (copies, spacers))
    return [_result(job, case, contender, timed, copy, spacer) for contender, timed in ready.items()]


def _prepare(contender: Contender, case: BenchCase, job: Job, procedure: Procedure) -> _Timed:
    """Warm up, check and record a contender. Collective; if one rank fails, all raise `Absent`."""
    job.run_collectively(contender.select)
    calls = procedure.calls or calls_for(case.device_type, case.nbytes)
    warmup = max(1, min(procedure.warmup, calls))
    if contender.kind == "limit":
        # A limit has no chain and no result to compare.
        state = job.run_collectively(lambda: contender.inputs(case))
        calls = -(-calls // contender.unit)

        def repeat(count: int = calls) -> None:
            for _ in range(count):
                contender.call(state, None, in_place=False)

        job.run_collectively(lambda: repeat(min(warmup, calls)))
        return _Timed(contender.name, _make_launch(job, case, contender, repeat), calls * contender.unit)

    chain: Chain = job.run_collectively(lambda: Chain(contender, case, job))
    # One call first: a rank that can't make it reports that before the others wait for its second call.
    job.run_collectively(lambda: chain.run(1))
    job.run_collectively(lambda: chain.run(warmup))
    wrong = None
    if procedure.checks:
        check: Check = job.run_collectively(lambda: Check(contender, case, job, chain.buffers))
        run, wrong = _make_launch(job, case, contender, check.run), 0
        for number in range(_CHECKS):
            salt = 100 * (number + 1)
            check.fill(salt)
            job.run_collectively(run)
            wrong += job.run_collectively(functools.partial(check.count_wrong, salt))
    launch = _make_launch(job, case, contender, lambda: chain.run(calls))
    return _Timed(contender.name, launch, calls, chain, contender.select, wrong)


def _copies(case: BenchCase, job: Job) -> _Timed:
    """Prepare the copies that restart a chain, to be timed on their own."""
    values = initial_state(case, job)
    buffers = tuple(map(torch.empty_like, values))

    def body() -> None:
        for _ in range(_COPIES):
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)

    return _Timed("copies", _make_launch(job, case, Recorder(), body), _COPIES)


def _spacers(case: BenchCase, job: Job) -> _Timed:
    """Prepare spacers, to be timed on their own."""
    spacer = Spacer(case)

    def body() -> None:
        for _ in range(_SPACERS):
            spacer.run()

    return _Timed("spacers", _make_launch(job, case, Recorder(), body), _SPACERS)


def _make_launch(job: Job, case: BenchCase, recorder: Recorder, body: Callable[[], None]) -> Callable[[], object]:
    """Return the replay of `body` in graph mode, else `body` itself, after one run of it. Collective."""
    launch: Callable[[], object] = body
    if case.mode == "graph":
        launch = job.run_collectively(lambda: recorder.record(body))
    job.run_collectively(launch)
    return launch


def _time(job: Job, launch: Callable[[], object], launches: int) -> float:
    """Return the seconds of one launch, as the mean of `launches` in a row.

    An untimed launch comes first. Its last call leaves the ranks at most one message apart; and on a GPU the timed
    launches queue behind it, so that the first of them doesn't wait for the host.
    """
    if job.device.type != "cuda":
        job.barrier()
        launch()
        begin = time.perf_counter()
        for _ in range(launches):
            launch()
        return (time.perf_counter() - begin) / launches
    torch.cuda.synchronize(job.device)
    job.barrier()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    launch()
    first.record()
    for _ in range(launches):
        launch()
    last.record()
    last.synchronize()
    elapsed_ms: float = first.elapsed_time(last)
    return elapsed_ms / 1e3 / launches


def _result(job: Job, case: BenchCase, contender: Contender, timed: _Timed, copy: float, spacer: float) -> Measured:
    """Combine the ranks' results: the slowest rank's time of each repetition, all wrong elements. Collective."""
    restarts = timed.chain.restarts(timed.calls) if timed.chain is not None else 0
    per_call = spacer if timed.chain is not None and timed.chain.has_spacers else 0.0
    wrong = None if timed.wrong is None else sum(job.all_gather(timed.wrong))
    mine = [((seconds - restarts * copy) / timed.calls - per_call) * 1e6 for seconds in timed.seconds]
    slowest = tuple(max(times) for times in zip(*job.all_gather(mine), strict=True))
    copy_us = max(job.all_gather(copy)) * 1e6 if restarts else 0.0
    spacer_us = max(job.all_gather(per_call)) * 1e6
    return Measured(contender, case, timed.calls, restarts, copy_us, spacer_us, slowest, wrong)
