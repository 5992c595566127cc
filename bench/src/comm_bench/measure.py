"""The measurement: contenders in turns, each repetition the slowest rank's time."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from comm_core import env

from comm_bench.cases import BenchCase, calls_for
from comm_bench.chains import Chain, Check, Spacer, start
from comm_bench.contenders import Absent, Contender, Job, Recorder

__all__ = ["Measured", "Procedure", "measure"]

# Runs of the untimed check, each with new inputs.
_CHECKS = 3
# Copies, and spacers, that are timed together, to tell what one takes.
_COPIES = 16
_SPACERS = 200


@dataclasses.dataclass(frozen=True)
class Procedure:
    """How everything is measured.

    Attributes:
        calls: in a chain; None: by `calls_for`.
        launches: chains, or replays of a graph, that are timed together.
        warmup: calls, at least, before anything is recorded or timed.
        repetitions: of each timing.
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
        contender: whose.
        case: what.
        calls: in a chain.
        restarts: of a chain.
        copy_us: what one restart took, and was subtracted for it.
        spacer_us: what one spacer took, and was subtracted for each call; 0 without.
        times_us: of one call, the slowest rank's, by repetition.
        wrong: wrong elements on all ranks together; None where nothing was compared.
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
    """Something that is timed in turns with others.

    Attributes:
        name: for people.
        launch: runs it once.
        calls: that one launch makes.
        chain: the chain that it runs, if it is one.
        wrong: this rank's wrong elements in its check; None where it has none.
        seconds: of one launch on this rank, by repetition.
    """

    name: str
    launch: Callable[[], object]
    calls: int
    chain: Chain | None = None
    wrong: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


def measure(
    job: Job, case: BenchCase, contenders: Sequence[Contender], procedure: Procedure, absent: Callable[[str, str], None]
) -> list[Measured]:
    """Time every contender that takes the case, in turns. Collective.

    Args:
        job: the ranks.
        case: what to measure.
        contenders: the same on every rank, in the same order.
        procedure: how.
        absent: told the name of a contender that can't do this case after all, and why.
    """
    deadlines = env.Settings.read()
    ready: dict[Contender, _Timed] = {}
    for contender in contenders:
        if contender.takes(case):
            try:
                # It may build its kernels now.
                with job.watch.step(f"{contender.name} in {case}, before it is timed", deadlines.connect_timeout_s):
                    ready[contender] = _prepare(contender, case, job, procedure)
            except Absent as reason:
                absent(contender.name, str(reason))
    copies, spacers = _copies(case, job), _spacers(case, job)
    everyone = [copies, spacers, *ready.values()]
    for repetition in range(procedure.repetitions):
        # Whoever goes first in one repetition goes last in the next.
        turn = repetition % len(everyone)
        for timed in everyone[turn:] + everyone[:turn]:
            with job.watch.step(f"{timed.name} in {case}", deadlines.wait_timeout_s):
                timed.seconds.append(_time(job, timed.launch, procedure.launches))
            if timed.chain is not None and timed.wrong is not None and repetition == procedure.repetitions - 1:
                # At once: another contender of the same library may use the same memory.
                timed.wrong += timed.chain.wrong(timed.calls)
    copy, spacer = (statistics.median(timed.seconds) / timed.calls for timed in (copies, spacers))
    return [_result(job, case, contender, timed, copy, spacer) for contender, timed in ready.items()]


def _prepare(contender: Contender, case: BenchCase, job: Job, procedure: Procedure) -> _Timed:
    """Warm up, check and record. Collective; where one rank fails, `Absent` on all."""
    calls = procedure.calls or calls_for(case.device_type, case.nbytes)
    warmup = max(1, min(procedure.warmup, calls))
    if contender.kind == "limit":
        # Nothing to depend on, nothing to compare.
        state = job.together(lambda: contender.inputs(case))
        calls = -(-calls // contender.unit)

        def repeat(count: int = calls) -> None:
            for _ in range(count):
                contender.call(state, None, in_place=False)

        job.together(lambda: repeat(min(warmup, calls)))
        return _Timed(contender.name, _recorded(job, case, contender, repeat), calls * contender.unit)

    chain: Chain = job.together(lambda: Chain(contender, case, job))
    # One at first: whoever can't says so before the others wait for its second.
    job.together(lambda: chain.run(1))
    job.together(lambda: chain.run(warmup))
    wrong = None
    if procedure.checks:
        check: Check = job.together(lambda: Check(contender, case, job, chain.buffers))
        run, wrong = _recorded(job, case, contender, check.run), 0
        for number in range(_CHECKS):
            salt = 100 * (number + 1)
            check.fill(salt)
            job.together(run)
            wrong += check.wrong(salt)
    launch = _recorded(job, case, contender, lambda: chain.run(calls))
    return _Timed(contender.name, launch, calls, chain, wrong)


def _copies(case: BenchCase, job: Job) -> _Timed:
    """The copies that start chains anew, alone."""
    values = start(case, job)
    buffers = tuple(map(torch.empty_like, values))

    def body() -> None:
        for _ in range(_COPIES):
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)

    return _Timed("copies", _recorded(job, case, Recorder(), body), _COPIES)


def _spacers(case: BenchCase, job: Job) -> _Timed:
    """Spacers alone."""
    spacer = Spacer(case)

    def body() -> None:
        for _ in range(_SPACERS):
            spacer.run()

    return _Timed("spacers", _recorded(job, case, Recorder(), body), _SPACERS)


def _recorded(job: Job, case: BenchCase, recorder: Recorder, body: Callable[[], None]) -> Callable[[], object]:
    """In graph mode a replay of what `body` does, else `body` itself; run once. Collective."""
    launch: Callable[[], object] = body
    if case.mode == "graph":
        launch = job.together(lambda: recorder.record(body))
    job.together(launch)
    return launch


def _time(job: Job, launch: Callable[[], object], launches: int) -> float:
    """Seconds of one launch, as the mean of `launches` in a row.

    One more goes before, untimed: its last call leaves the ranks within a message of each other; and on a GPU the timed
    ones queue up behind it, so that the first doesn't wait for the host.
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
    """Each repetition's slowest rank, and everybody's wrong elements. Collective."""
    restarts = timed.chain.restarts(timed.calls) if timed.chain is not None else 0
    per_call = spacer if timed.chain is not None and timed.chain.spaced else 0.0
    wrong = None if timed.wrong is None else sum(job.gather(timed.wrong))
    mine = [((seconds - restarts * copy) / timed.calls - per_call) * 1e6 for seconds in timed.seconds]
    slowest = tuple(max(times) for times in zip(*job.gather(mine), strict=True))
    copy_us = max(job.gather(copy)) * 1e6 if restarts else 0.0
    spacer_us = max(job.gather(per_call)) * 1e6
    return Measured(contender, case, timed.calls, restarts, copy_us, spacer_us, slowest, wrong)
