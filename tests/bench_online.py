"""Bench of online planning: a re-plan after one arrival among 32 tasks on LLaMA2-7B, S=4, C=8, against planning anew."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.online.cache import PlanCache
from muxtune.policies.online.decide import Answer
from muxtune.policies.online.replan import replan
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from tests.bench_planners import CLUSTERS, workload

#: Types among the 32 tasks that are there after the arrival.
TYPES = (6, 12, 32)
TARGET_MS = 200
ROUNDS = 3


def arrival(types: int, cluster: str) -> str:
    """CPU time of a re-plan judged by the template, and what it loses against a new plan of the policy."""
    here = workload(32, types)
    before = SystemState(
        workload=replace(here, tasks=here.tasks[:-1]),
        cluster=parse_cluster(cluster),
        layout=even_layout(here.model, pp=4),
        microbatches=8,
    )
    times = []
    for _ in range(ROUNDS):
        # A cost model remembers prices: each round's has priced the plan in force, and nothing with the new task.
        cost = Roofline()
        policy = make_policy("muxtune:charge=exact", cost)
        state = replace(before, workload=here, current=policy.plan(before))
        start_s = time.process_time()
        found = replan(policy, state)
        times.append(time.process_time() - start_s)
    policy = make_policy("muxtune:charge=exact", Roofline())
    start_s = time.process_time()
    anew = policy.plan(replace(state, current=None))
    full_s = time.process_time() - start_s
    cache = PlanCache[Answer]()
    replan(policy, state, cache=cache)
    start_s = time.process_time()
    replan(policy, state, cache=cache)
    hit_s = time.process_time() - start_s
    evaluate = make_evaluate(cost, 0)
    ratio = evaluate(found.plan).iteration_ns / evaluate(anew).iteration_ns
    return (
        f"re-plan after one arrival, 32 tasks of {types} types, {cluster}: {1e3 * min(times):.0f} ms CPU, best of {ROUNDS} "
        f"(target {TARGET_MS}), {full_s / min(times):.1f} x faster than planning anew, {1e3 * hit_s:.0f} ms from the cache; "
        f"iteration {ratio:.3f} x that of a new plan, {found.moves} moves, {len(found.moved)} tasks changed company"
    )


def lines() -> Iterator[str]:
    """Every figure."""
    for types in TYPES:
        for cluster in CLUSTERS:
            yield arrival(types, cluster)
