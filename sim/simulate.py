"""simulate: a bound Plan through the SimPy engines; estimate: mean and spread over draws through the closed forms."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np

from muxtune.sim.at_once import Lost, lost
from muxtune.sim.cost.base import Cost, CostModel
from muxtune.sim.ledger import Ledger
from muxtune.sim.pipeline import run_pipeline
from muxtune.sim.priced import PricedProgram, price
from muxtune.sim.record import outline, record
from muxtune.sim.recurrence import recur, recur_blocks
from muxtune.sim.stage import StageCache
from muxtune.spec.align import count_tokens
from muxtune.spec.bind import bind
from muxtune.spec.check import require_valid
from muxtune.spec.errors import InputError
from muxtune.spec.estimate import Estimate, Share, TaskStep
from muxtune.spec.flops import useful_flops
from muxtune.spec.memory import RankPeak, rank_peaks
from muxtune.spec.metrics import TaskPace, bubble_fraction, task_paces
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.stalls import BUSY, EXPOSED, HOST, Clocks, fractions, rank_times
from muxtune.spec.timeline import Timeline
from muxtune.spec.units import NS_PER_S


@noun
class Simulation:
    """One Program, simulated: what ran when, its figures, and its events (an event is one span).

    Of the stages' clocks, `stages_simulated` were run on their streams and `stages_reused` equal one that was run before.
    """

    timeline: Timeline
    estimate: Estimate
    events: int
    stages_simulated: int
    stages_reused: int


@noun
class _Run:
    """One priced and timed Program; its `timeline` has whole instructions only."""

    bound: Bound
    priced: PricedProgram
    timeline: Timeline
    peak_bytes: tuple[int, ...]
    lost: Lost = Lost()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's cycle collector: it would walk every span again and again, and there is no cycle to find."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@collector_paused()
def simulate(bound: Bound, cost: CostModel, cache: StageCache | None = None) -> Simulation:
    """Run one Program on the SimPy engines, with subgraph spans, memory and power samples.

    `cache` holds stages that were run before; it must be of the same cost model.

    Raises:
        PlanError: the Program deadlocks. ExtrapolationError: the cost model has no figure for an operator.
    """
    shared = StageCache(cost) if cache is None else cache
    before = shared.simulated
    priced = price(bound, cost, shared)
    times, _ = run_pipeline(priced)
    timeline = record(bound, priced, times)
    assert timeline.peak_bytes is not None
    outlined = replace(timeline, spans=tuple(s for s in timeline.spans if s.subgraph < 0))
    run = _Run(bound=bound, priced=priced, timeline=outlined, peak_bytes=timeline.peak_bytes, lost=lost(priced, times))
    found = _summary([run], cost)
    clocks = sum(x.run is not None for listing in priced.ranks for x in listing.instructions)
    simulated = shared.simulated - before
    return Simulation(
        timeline=timeline,
        estimate=found,
        events=len(timeline.spans),
        stages_simulated=simulated,
        stages_reused=clocks - simulated,
    )


def estimate(
    plan: Plan, cost: CostModel, seed: int, draws: int = 8, steps: int = 1, cache: StageCache | None = None
) -> Estimate:
    """Mean over draws, and their relative spread where an hTask is `varlen`.

    Draw d covers the optimizer steps from d·steps on of the seed's stream, as an executor that runs on would draw them.
    `steps` is rounded up to whole passes over explicit orders of several steps. With `pad` and `chunk` every shape is
    fixed: one draw has the exact times, and its raw and truncated token counts stand for all (`Estimate.draws` is then 1).
    `cache` must be of the same cost model.

    Raises:
        InputError: no draw is asked for.
        PlanError: the Program deadlocks. ExtrapolationError: the cost model has no figure for an operator.
    """
    if draws < 1:
        raise InputError(f"draws={draws}: must be at least 1")
    covered = math.lcm(*(i.steps for i in plan.instances))
    whole = -(-steps // covered) * covered
    shared = StageCache(cost, recur_blocks) if cache is None else cache
    first = bind(plan, seed=seed, steps=whole)
    return _estimated(plan, cost, seed, draws, shared, first, rank_peaks(first))


def _estimated(
    plan: Plan,
    cost: CostModel,
    seed: int,
    draws: int,
    cache: StageCache,
    first: Bound,
    first_peaks: Sequence[RankPeak],
) -> Estimate:
    """`estimate` from its first draw and that one's memory."""
    varlen = any(h.alignment == "varlen" for i in plan.instances for h in i.htasks)
    steps = first.program.steps
    runs: list[_Run] = []
    for draw in range(draws if varlen else 1):
        bound = bind(plan, seed=seed, steps=steps, first_step=draw * steps) if draw else first
        priced = price(bound, cost, cache)
        times = run_pipeline(priced)[0] if priced.beside else recur(priced)
        timeline = outline(bound, priced, times)
        peaks = tuple(p.peak_bytes for p in (rank_peaks(bound) if draw else first_peaks))
        runs.append(_Run(bound=bound, priced=priced, timeline=timeline, peak_bytes=peaks, lost=lost(priced, times)))
    return _summary(runs, cost)


def make_evaluate(cost: CostModel, seed: int, draws: int = 8) -> Callable[[Plan], Estimate]:
    """The `evaluate` that a searching policy is handed; stage runs are shared by all plans that it tries.

    The function raises PlanError for a plan that `check` refuses, memory included.
    """
    cache = StageCache(cost, recur_blocks)

    def evaluate(plan: Plan) -> Estimate:
        # The Program that is checked is the first draw.
        return _estimated(plan, cost, seed, draws, cache, *require_valid(plan, seed))

    return evaluate


def _summary(runs: Sequence[_Run], cost: CostModel) -> Estimate:
    """One Estimate of the runs of one plan; figures are means over the runs, peaks their maxima."""
    timelines = [r.timeline for r in runs]
    iterations_ns = [t.makespan_ns / t.steps for t in timelines]
    mean_ns = statistics.fmean(iterations_ns)
    device_ns = sum(len(t.ranks) * t.makespan_ns for t in timelines)
    ledger = Ledger()
    for run in runs:
        ledger.add_sum(run.priced.costs)
        if not run.lost.slowed_ns:
            continue
        slowing = Cost(p50_ns=run.lost.slowed_ns, relative_error=_share(run.lost.error_ns, run.lost.slowed_ns))
        ledger.add("interference", replace(slowing, p50_ns=slowing.p50_ns - run.lost.default_ns))
        ledger.add("interference", replace(slowing, p50_ns=run.lost.default_ns, extrapolated=cost.calibrated))
    costs = ledger.sum()
    raw, billed, processed, truncated = (round(statistics.fmean(n)) for n in zip(*map(_tokens, runs), strict=True))
    at_once = any(r.priced.beside for r in runs)
    shares = fractions(t for r in runs for t in rank_times(r.timeline, _clocks(r.priced, r.timeline)))
    energy = _energy_j(runs, costs.joules)
    return Estimate(
        iteration_ns=round(mean_ns),
        spread=statistics.stdev(iterations_ns) / mean_ns if len(runs) > 1 else 0.0,
        draws=len(runs),
        per_task=_per_task(runs),
        peak_bytes=tuple(max(rank) for rank in zip(*(r.peak_bytes for r in runs), strict=True)),
        raw_tokens=raw,
        billed_tokens=billed,
        processed_tokens=processed,
        truncated_tokens=truncated,
        bubble_fraction=statistics.fmean(bubble_fraction(t) for t in timelines),
        # Under one list a clock's own figures hold; of lists that run at once one computes while the other waits.
        exposed_comm_fraction=shares[EXPOSED][1] if at_once else sum(r.priced.exposed_ns for r in runs) / device_ns,
        host_bound_fraction=shares[HOST][1] if at_once else sum(r.priced.host_bound_ns for r in runs) / device_ns,
        extrapolated_fraction=costs.extrapolated_ns / costs.p50_ns if costs.p50_ns else 0.0,
        relative_error=costs.relative_error,
        energy_j=None if energy is None else sum(energy),
        cost_model=cost.model_id,
        calibrated=cost.calibrated,
        utilisation=sum(fraction for place, (_, fraction) in enumerate(shares) if place in BUSY),
        mfu=_mfu(runs, "raw", device_ns),
        mfu_billed=_mfu(runs, "billed", device_ns),
        stalls=tuple(Share(cause=cause, fraction=fraction) for cause, fraction in shares),
        energy_idle_j=None if energy is None else energy[0],
        energy_dynamic_j=None if energy is None else energy[1],
        corun_slowed_fraction=sum(r.lost.slowed_ns for r in runs) / device_ns if at_once else None,
        corun_default_fraction=_share(
            *map(sum, zip(*((r.lost.default_ns, r.lost.slowed_ns) for r in runs), strict=True))
        )
        if at_once
        else None,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _clocks(priced: PricedProgram, timeline: Timeline) -> Clocks:
    """Compute and exposed communication inside every forward and backward; equal clocks are one run.

    What a clock lost to others on its device is time in which it computes.
    """
    known: dict[int, tuple[int, int]] = {}
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for listing in priced.ranks:
        for index, x in enumerate(listing.instructions):
            if x.run is not None:
                if id(x.run) not in known:
                    known[id(x.run)] = (x.run.compute_ns, x.run.exposed_ns)
                found[listing.rank, index] = known[id(x.run)]
    if priced.beside:
        alone_ns = {(p.rank, i): x.duration_ns for p in priced.ranks for i, x in enumerate(p.instructions)}
        for span in timeline.spans:
            if (place := (span.rank, span.index)) in found:
                compute_ns, exposed_ns = found[place]
                found[place] = (compute_ns + span.duration_ns - alone_ns[place], exposed_ns)
    return found


def _mfu(runs: Sequence[_Run], tokens: Literal["raw", "billed"], device_ns: int) -> float:
    """Useful flops over what the ranks' peak would do in their time."""
    useful = sum(
        useful_flops(r.bound.plan.workload, (b for w in r.bound.program.units for b in w.batches), tokens) for r in runs
    )
    plan = runs[0].bound.plan
    return useful * NS_PER_S / (plan.cluster.device.peak_flops(plan.workload.model.dtype) * device_ns)


def _per_task(runs: Sequence[_Run]) -> tuple[TaskStep, ...]:
    """Means over the runs."""
    paces: dict[str, list[TaskPace]] = {}
    for run in runs:
        for pace in task_paces(run.timeline, run.bound.plan.instances):
            paces.setdefault(pace.task, []).append(pace)
    return tuple(
        TaskStep(
            task=task,
            step_ns=round(statistics.fmean(p.step_ns for p in found)),
            period_ns=round(statistics.fmean(p.period_ns for p in found)),
            end_ns=round(statistics.fmean(p.end_ns for p in found)),
        )
        for task, found in sorted(paces.items())
    )


def _energy_j(runs: Sequence[_Run], joules: float) -> tuple[float, float] | None:
    """Energy of one iteration: idle watts of every rank all the time, and operators above idle.

    None where the cost model has no energy figures.
    """
    if joules <= 0:
        return None
    idle_j = sum(
        len(r.timeline.ranks) * r.bound.plan.cluster.device.idle_w * r.timeline.makespan_ns / NS_PER_S for r in runs
    )
    steps = sum(r.timeline.steps for r in runs)
    return idle_j / steps, joules / steps


def _tokens(run: _Run) -> tuple[float, float, float, float]:
    """Raw, billed, processed and truncated tokens of one optimizer step."""
    program, workload = run.bound.program, run.bound.plan.workload
    billed_len = [(t.task_id, t.billed_len_tokens) for t in workload.tasks]
    raw, billed, processed = count_tokens((b for w in program.units for b in w.batches), billed_len)
    truncated = _drawn_tokens(run.bound) - raw
    return raw / program.steps, billed / program.steps, processed / program.steps, truncated / program.steps


def _drawn_tokens(bound: Bound) -> int:
    """Tokens of the drawn samples before truncation."""
    samples: dict[str, list[int]] = {}
    for row in (row for work in bound.program.units for batch in work.batches for row in batch.rows):
        if not row.past_tokens:  # a sample in several chunks counts once
            samples.setdefault(row.task, []).append(row.sample)
    drawn = 0
    for task, ids in samples.items():
        workload = bound.plan.workload
        prompt, response = workload.lengths(workload.task(task)).lengths(np.asarray(ids, dtype=np.int64))
        drawn += int(prompt.sum() + response.sum())
    return drawn
