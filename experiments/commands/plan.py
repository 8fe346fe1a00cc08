"""plan: one policy decides; the Plan is written with what the simulator predicts of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import output_file, provenance
from muxtune.experiments.commands.problem import Options, problem_text, read_problem
from muxtune.experiments.commands.rows import UNCALIBRATED, feasible_row, figures_table
from muxtune.experiments.console import render
from muxtune.policies.alone import Alone
from muxtune.policies.base import Policy, SystemState, make_policy
from muxtune.policies.choices import Choices, plan_over
from muxtune.spec.errors import InfeasibleError, InputError, MuxtuneError, PlanError
from muxtune.spec.files import write_noun
from muxtune.spec.plan import Plan


def run(workload: Path, cluster: str, policy: str, out: Path, options: Options | None = None) -> dict[str, Any]:
    """Plan and write `out`.

    Raises:
        InfeasibleError: the policy found no plan, with the reason. PlanError: it made one that cannot be executed.
        InputError: wrong file, name or option.
    """
    path = output_file(out)
    problem = read_problem(workload, cluster, options or Options())
    made = with_alone(timed_plan(make_policy(policy, problem.cost), problem.state(), problem.choices), problem.alone())
    write_noun(made, path)
    assert made.predicted is not None
    row = feasible_row(policy, made, made.predicted, problem.options.objectives)
    return {**problem.body(), **row, "out": str(path)}


def with_alone(plan: Plan, alone: Alone) -> Plan:
    """The plan, its prediction with every task's slowdown."""
    assert plan.predicted is not None
    return replace(plan, predicted=alone.slowdowns(plan, plan.predicted))


def timed_plan(policy: Policy, state: SystemState, choices: Choices | None = None) -> Plan:
    """Let a policy plan; add the prediction (which refuses a plan that `check` refuses) and the seconds it took.

    With `choices` it plans over those layouts and micro-batch counts.

    Raises:
        InputError: the policy itself is broken. PlanError: it planned something else than it was asked for.
        InfeasibleError: the goal caps slowdowns, and the plan does not keep to it.
    """
    name = type(policy).__name__
    return timed(
        name, state, lambda: policy.plan(state) if choices is None else plan_over(policy, name, state, choices)
    )


def timed(name: str, state: SystemState, decide: Callable[[], Plan]) -> Plan:
    """What is decided, as `timed_plan` has it; `name` is the policy's, for what goes wrong."""
    started_s = time.perf_counter()
    try:
        made = decide()
    except MuxtuneError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"policy {name} failed with {type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
        ) from error
    seconds = time.perf_counter() - started_s
    if not isinstance(made, Plan):
        raise InputError(f"policy {name}: plan() returned {type(made).__name__}, not a Plan")
    if (made.workload, made.cluster) != (state.workload, state.cluster):
        raise PlanError(
            f"policy {name}: its plan has another workload or cluster than it was given: plan state.workload"
        )
    assert state.evaluate is not None
    predicted = state.evaluate(replace(made, predicted=None))
    if refusal := state.goal.refusal(state.workload, predicted):
        raise InfeasibleError(f"policy {made.made_by.policy}: {refusal}")
    return replace(made, predicted=predicted, provenance=provenance(seconds))


def replan_text(found: dict[str, Any]) -> str:
    """Whether the plan in force stays, and why."""
    head = "kept the plan in force" if found["kept"] else "changed the plan in force"
    names = (f"{word}: {', '.join(found[word]) or 'none'}" for word in ("arrived", "left", "moved"))
    return f"{head}: {found['reason']}; {'; '.join(names)}"


def show(body: dict[str, Any]) -> str:
    """A short table."""
    parts = [problem_text(body), figures_table([body], objectives=[body["objective"]])]
    parts += [*([replan_text(body["replan"])] if "replan" in body else []), f"wrote {body['out']}"]
    return render(*parts, *([] if body["cost_model"]["calibrated"] else [UNCALIBRATED]))
