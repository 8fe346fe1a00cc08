"""Speeds of the simulator, part of `make bench`: every figure with its target, in CPU time, on one run of one machine."""

from __future__ import annotations

import heapq
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace

from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.pipeline import run_pipeline
from muxtune.sim.priced import price
from muxtune.sim.recurrence import recur, recur_blocks
from muxtune.sim.simulate import estimate, simulate
from muxtune.sim.stage import StageCache
from muxtune.spec.bind import bind
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.task import Workload

ROUNDS = 9
COST = Roofline()


def cpu_s(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median CPU seconds of a call, after one that is not counted."""
    call()
    times: list[float] = []
    for _ in range(rounds):
        start_s = time.process_time()
        call()
        times.append(time.process_time() - start_s)
    return statistics.median(times)


def bare_heap(events: int, pending: int) -> None:
    """The least that an event queue does: take the next of `pending` entries, put its successor."""
    heap = [(i, i) for i in range(pending)]
    for _ in range(events):
        at, number = heapq.heappop(heap)
        heapq.heappush(heap, (at + pending + number % 3, number))


def planned(workload: Workload, policy: str, microbatches: int) -> Plan:
    """A plan on four H200 as four stages."""
    layout = even_layout(workload.model, pp=4)
    state = SystemState(
        workload=workload, cluster=parse_cluster("4xH200"), layout=layout, microbatches=microbatches, seed=0
    )
    return make_policy(policy, COST).plan(state)


def verdict(value: float, target: float, *, most: bool = False) -> str:
    """The target and whether it was met."""
    met = value <= target if most else value >= target
    return f"(target {'<=' if most else '>='} {target:,g}: {'met' if met else 'MISSED'})"


def simulating(eight: Workload) -> Iterator[str]:
    """LLaMA2-7B, eight tasks, four stages, eight micro-batches; then many micro-batches of two tasks."""
    for policy in ("muxtune", "temporal"):
        plan = planned(eight, policy, 8)
        yield from _event_queue(f"simulate llama2-7b, 8 tasks, S=4, C=8, {policy}", plan)
        yield from _recurrence(plan)
    yield from _growth(eight)


def _event_queue(name: str, plan: Plan) -> Iterator[str]:
    """SimPy engine with timeline, memory and p2p on, and pricing and engine alone (off; messages still move)."""
    bound, seen = bind(plan, seed=0), StageCache(COST)
    found = simulate(bound, COST, seen)
    cold_s = cpu_s(lambda: simulate(bound, COST))
    seen_s = cpu_s(lambda: simulate(bound, COST, seen))
    off_s = cpu_s(lambda: run_pipeline(price(bound, COST, StageCache(COST))))
    off_seen_s = cpu_s(lambda: run_pipeline(price(bound, COST, seen)))
    pending = len(found.timeline.ranks) + len(price(bound, COST, seen).channels)
    events, heap_s = found.events, cpu_s(lambda: bare_heap(found.events, pending))
    yield (
        f"{name}: {events} spans, {found.stages_simulated} stage clocks simulated, {found.stages_reused} reused; "
        f"memory, p2p, timeline on: {1e3 * cold_s:.1f} ms cold {verdict(1e3 * cold_s, 250, most=True)}, "
        f"{1e3 * seen_s:.1f} ms with shapes seen {verdict(1e3 * seen_s, 20, most=True)}"
    )
    yield (
        f"  events per CPU-second, on: {events / cold_s:,.0f} cold {verdict(events / cold_s, 80_000)}, "
        f"{events / seen_s:,.0f} seen; off: {events / off_s:,.0f} cold {verdict(events / off_s, 110_000)}, "
        f"{events / off_seen_s:,.0f} seen"
    )
    yield (
        f"  bare heapq loop: {events / heap_s:,.0f} events per CPU-second; ratio on: {heap_s / seen_s:.3f} seen "
        f"{verdict(heap_s / seen_s, 0.12)}, {heap_s / cold_s:.3f} cold; "
        f"off: {heap_s / off_seen_s:.3f} seen {verdict(heap_s / off_seen_s, 0.12)}, {heap_s / off_s:.3f} cold"
    )


def _recurrence(plan: Plan) -> Iterator[str]:
    bound, seen = bind(plan, seed=0), StageCache(COST, recur_blocks)
    priced = price(bound, COST, seen)
    units = sum(x.run is not None for listing in priced.ranks for x in listing.instructions)
    recur_s = cpu_s(lambda: recur(priced))
    priced_s = cpu_s(lambda: recur(price(bound, COST, seen)))
    estimate_s = cpu_s(lambda: estimate(plan, COST, seed=0, cache=seen))
    yield (
        f"  recurrence: {units / recur_s:,.0f} units (forwards and backwards of a stage) per CPU-second "
        f"{verdict(units / recur_s, 1_000_000)}; pricing and recurrence with shapes seen: {1e3 * priced_s:.1f} ms "
        f"{verdict(1e3 * priced_s, 5, most=True)}; a whole estimate (bind, memory, figures) {1e3 * estimate_s:.1f} ms"
    )


def _two_tasks(eight: Workload, microbatches: int) -> Bound:
    """Two tasks with one sample in each micro-batch."""
    tasks = tuple(replace(t, global_batch_samples=microbatches) for t in eight.tasks[:2])
    used = {t.dataset for t in tasks}
    pair = replace(eight, tasks=tasks, datasets=tuple(d for d in eight.datasets if d.name in used))
    return bind(planned(pair, "temporal", microbatches), seed=0)


def _growth(eight: Workload) -> Iterator[str]:
    """Cost per micro-batch, and the memory of a long Program."""
    each_us: dict[int, float] = {}
    for microbatches in (8, 32, 128, 512):
        bound, seen = _two_tasks(eight, microbatches), StageCache(COST)
        each_us[microbatches] = 1e6 * cpu_s(lambda b=bound, s=seen: simulate(b, COST, s), 5) / microbatches  # type: ignore[misc]
    rows = ", ".join(f"C={c}: {us:.0f} us ({us / each_us[8]:.2f} x)" for c, us in each_us.items())
    yield f"  per simulated micro-batch of 2 tasks, shapes seen (target: flat): {rows}"
    instructions = sum(len(r.instructions) for r in bound.program.ranks)
    tracemalloc.start()
    found = simulate(bound, COST)
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6 * 10_000 / instructions
    tracemalloc.stop()
    yield (
        f"  memory: {peak_mb:.0f} MB per 10,000 instructions {verdict(peak_mb, 100, most=True)}, "
        f"measured on {instructions:,} instructions, {found.events:,} spans"
    )
