"""plan --current: the plan in force, changed for who is here now, and whether a larger change would pay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import output_file, read_plan
from muxtune.experiments.commands.plan import timed, with_alone
from muxtune.experiments.commands.problem import Options, read_problem
from muxtune.experiments.commands.rows import feasible_row
from muxtune.policies.base import make_policy
from muxtune.policies.online.config import ReplanConfig
from muxtune.policies.online.replan import Replan, replan
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_noun
from muxtune.spec.noun import plain
from muxtune.spec.plan import Plan
from muxtune.spec.units import NS_PER_S

#: What of a plan's layout the plan in force decides, and what says that nothing was asked.
FREE = {
    "tp": 1,
    "pp": None,
    "dp": 1,
    "sequence_parallel": False,
    "recompute": "none",
    "search_layout": False,
    "microbatches": Options().microbatches,
}


def parse_charges(current: Path | None, replan_cost_s: float, horizon_s: float, full: bool) -> ReplanConfig:
    """What a change has to pay for.

    Raises:
        InputError: a negative or endless time, or a charge without a plan in force.
    """
    if not 0 <= replan_cost_s < math.inf:
        raise InputError(f"--replan-cost {replan_cost_s}: give seconds, at least 0")
    if not 0 < horizon_s < math.inf:
        raise InputError(f"--horizon {horizon_s}: give seconds above 0")
    config = ReplanConfig(
        replan_cost_ns=round(replan_cost_s * NS_PER_S), horizon_ns=max(1, round(horizon_s * NS_PER_S)), full=full
    )
    if current is None and config != ReplanConfig():
        raise InputError("--replan-cost, --horizon and --full change a plan in force: name it with --current PLAN")
    return config


def run(
    workload: Path, cluster: str, policy: str, out: Path, options: Options, *, current: Path, config: ReplanConfig
) -> dict[str, Any]:
    """Change the plan in `current` for `workload` and write `out`; `replan` in the result says what was kept and why.

    Layout and C are those of the plan in force.

    Raises:
        InputError: wrong file, name or option; the plan in force is for another model or cluster.
        InfeasibleError: no plan fits, or none keeps to --max-slowdown.
    """
    path, in_force = output_file(out), read_plan(current)
    first = in_force.instances[0]
    problem = read_problem(workload, cluster, _options(in_force, options))
    problem = replace(problem, layout=first.layout, microbatches=first.microbatches, choices=None)
    state = replace(problem.state(), current=in_force)
    found: list[Replan] = []
    made_policy = make_policy(policy, problem.cost)

    def decide() -> Plan:
        found.append(replan(made_policy, state, config))
        return found[0].plan

    made = with_alone(timed(type(made_policy).__name__, state, decide), problem.alone())
    write_noun(made, path)
    assert made.predicted is not None
    row = feasible_row(policy, made, made.predicted, problem.options.objectives)
    return {**problem.body(), **row, "replan": _body(found[0], config), "out": str(path)}


def _options(in_force: Plan, options: Options) -> Options:
    """The options with the layout and C of the plan in force.

    Raises:
        InputError: a layout was asked for.
    """
    for name, default in FREE.items():
        if getattr(options, name) != default:
            raise InputError(
                f"--{name.replace('_', '-')} with --current: layout and micro-batches are those of the plan in force: "
                "leave it out, or plan without --current"
            )
    layout = in_force.instances[0].layout
    return replace(
        options,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
        microbatches=(in_force.instances[0].microbatches,),
    )


def _body(found: Replan, config: ReplanConfig) -> dict[str, Any]:
    """What was decided; the plan itself is in its file, and a single run has no cache to speak of."""
    body: dict[str, Any] = plain(replace(found, plan=None))  # type: ignore[arg-type]
    del body["plan"], body["cached"]
    return {**body, **plain(config)}
