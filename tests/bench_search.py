"""Bench of the planners that search: `search` against the paper's planner, sample packing, the layout search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.choices import layout_choices, plan_over
from muxtune.policies.packing import first_fit_decreasing, pack
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

DATASETS = ("sst2", "openbookqa", "rte")
#: (cluster, tp, pp, C) for 16 tasks on LLaMA2-7B.
SUITE = (("4xH200", 1, 4, 8), ("4xA40-pcie", 2, 2, 4), ("2xH100", 1, 2, 8))
EVALUATIONS = 200
SAMPLES, CAPACITY_TOKENS = 64, 1024


def workload(tasks: int) -> Workload:
    """LoRA tasks on LLaMA2-7B over three data sets, batches of 8 to 32."""
    made = tuple(
        Task(
            task_id=f"t{i:02d}",
            peft=LoRA(rank=8 << i % 3),
            dataset=DATASETS[i % 3],
            billed_len_tokens=embedded_length(DATASETS[i % 3]).covered_length(),
            global_batch_samples=8 * (1 + i % 4),
        )
        for i in range(tasks)
    )
    tables = tuple(embedded_length(d) for d in DATASETS[: min(3, tasks)])
    return Workload(name="bench", model=model_preset("llama2-7b"), datasets=tables, tasks=made)


def state_of(tasks: int, cluster: str, tp: int, pp: int, microbatches: int) -> SystemState:
    """A state with the simulator at hand."""
    made = workload(tasks)
    return SystemState(
        workload=made,
        cluster=parse_cluster(cluster),
        layout=even_layout(made.model, tp=tp, pp=pp),
        microbatches=microbatches,
        evaluate=make_evaluate(Roofline(), 0),
    )


def searching() -> Iterator[str]:
    """`search` on padded plans: seconds a thousand evaluations, and how far below `muxtune` it comes."""
    cost = Roofline()
    for cluster, tp, pp, microbatches in SUITE:
        state = state_of(16, cluster, tp, pp, microbatches)
        assert state.evaluate is not None
        paper_ns = state.evaluate(make_policy("muxtune", cost).plan(state)).iteration_ns
        start_s = time.process_time()
        record = make_policy(f"search:alignment=pad,evaluations={EVALUATIONS}", cost).plan(state).made_by.solver
        seconds = time.process_time() - start_s
        assert record is not None
        assert record.value_ns is not None
        yield (
            f"search 16 tasks, {cluster} tp={tp} pp={pp} C={microbatches}, pad: {record.evaluations} evaluations, "
            f"{1000 * seconds / record.evaluations:.0f} s a thousand (target 20), "
            f"{100 * (1 - record.value_ns / paper_ns):.1f} % below muxtune; {record.status.split(';')[1].strip()}"
        )


def packing() -> str:
    """Micro-batches of 64 samples: exact mode against first-fit-decreasing."""
    rng = np.random.default_rng(0)
    worst_s, greedy, exact, proven = 0.0, 0, 0, 0
    rounds = 50
    for _ in range(rounds):
        sizes = [int(n) for n in rng.integers(20, 500, SAMPLES)]
        start_s = time.process_time()
        found = pack(sizes, CAPACITY_TOKENS)
        worst_s = max(worst_s, time.process_time() - start_s)
        exact += len(found.bins)
        proven += found.proven
        greedy += len(first_fit_decreasing(sizes, CAPACITY_TOKENS).bins)
    return (
        f"pack {SAMPLES} samples, {rounds} draws: {exact} bins (first-fit-decreasing {greedy}), {proven} proven fewest, "
        f"at most {1000 * worst_s:.0f} ms (target 50)"
    )


def layouts() -> str:
    """The layout search around `muxtune`, 8 tasks on four devices."""
    state = replace(state_of(8, "4xH200", 1, 4, 4), evaluate=make_evaluate(Roofline(), 0))
    choices = layout_choices(state.workload, state.cluster, (2, 4, 8))
    start_s = time.process_time()
    plan = plan_over(make_policy("muxtune", Roofline()), "muxtune", state, choices)
    seconds = time.process_time() - start_s
    assert state.evaluate is not None
    given = state.evaluate(make_policy("muxtune", Roofline()).plan(state)).iteration_ns
    found = state.evaluate(plan).iteration_ns
    instance = plan.instances[0]
    return (
        f"layout search, muxtune, 8 tasks on 4xH200: {len(choices.kept)} choices in {seconds:.1f} s, "
        f"{instance.layout.name} C={instance.microbatches}: {given / found:.2f} x faster than tp=1 pp=4 C=4"
    )


def lines() -> Iterator[str]:
    """Every figure."""
    yield packing()
    yield layouts()
    yield from searching()
