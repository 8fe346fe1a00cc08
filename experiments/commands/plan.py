"""plan: one policy decides; the Plan is written with what the simulator predicts of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import choose_layout, layout_text, load_cost, output_file, provenance
from muxtune.experiments.commands.rows import UNCALIBRATED, Alone, cost_body, cost_text, feasible_row, figures_table
from muxtune.experiments.console import render
from muxtune.policies.base import Policy, SystemState, make_policy
from muxtune.sim.simulate import make_evaluate
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_noun
from muxtune.spec.noun import digest
from muxtune.spec.plan import Plan


def run(
    workload: Path,
    cluster: str,
    policy: str,
    out: Path,
    *,
    tp: int = 1,
    pp: int | None = None,
    dp: int = 1,
    microbatches: int = 4,
    cost: str = "roofline",
    allow_extrapolation: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Plan and write `out`.

    Raises:
        InfeasibleError: the policy found no plan, with the reason. PlanError: it made one that cannot be executed.
        InputError: wrong file, name or option.
    """
    path = output_file(out)
    tasks, place = read_workload(workload), read_cluster(cluster)
    model = load_cost(cost, place, allow_extrapolation)
    state = SystemState(
        workload=tasks,
        cluster=place,
        layout=choose_layout(tasks.model, place, tp, pp, dp),
        microbatches=microbatches,
        seed=seed,
        evaluate=make_evaluate(model, seed),
    )
    made = timed_plan(make_policy(policy, model), state)
    write_noun(made, path)
    assert made.predicted is not None
    alone = Alone(tasks, place, model, seed)
    return {
        "workload": tasks.name,
        "cluster": place.name,
        "layout": layout_text(state.layout),
        "microbatches": microbatches,
        "seed": seed,
        "cost_model": cost_body(model),
        **feasible_row(policy, made, made.predicted, alone.per_task(made, made.predicted)),
        "workload_digest": digest(tasks),
        "out": str(path),
    }


def timed_plan(policy: Policy, state: SystemState) -> Plan:
    """Let a policy plan; add the prediction (which refuses a plan that `check` refuses) and the seconds it took."""
    started_s = time.perf_counter()
    made = policy.plan(state)
    seconds = time.perf_counter() - started_s
    if not isinstance(made, Plan):
        raise InputError(f"policy {type(policy).__name__}: plan() returned {type(made).__name__}, not a Plan")
    assert state.evaluate is not None
    return replace(made, predicted=state.evaluate(replace(made, predicted=None)), provenance=provenance(seconds))


def show(body: dict[str, Any]) -> str:
    """A short table."""
    head = f"{body['workload']} on {body['cluster']}, {body['layout']}, {body['microbatches']} micro-batches"
    parts = [f"{head}, {cost_text(body['cost_model'])}", figures_table([body]), f"wrote {body['out']}"]
    return render(*parts, *([] if body["cost_model"]["calibrated"] else [UNCALIBRATED]))
