"""replan: the next plan from the plan in force. Arrivals are inserted, what left is removed, a few moves improve the rest.

What arrivals and departures force is free; any further change costs `replan_cost_ns`, and is made only where the time that it
saves over `horizon_ns` is more: horizon · (1 − cost after / cost before) > replan cost.
"""

from __future__ import annotations

from dataclasses import replace

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.online.cache import PlanCache
from muxtune.policies.online.config import ReplanConfig
from muxtune.policies.online.decide import Answer, decide
from muxtune.policies.online.question import Change, change, question_of, renamed
from muxtune.spec.errors import InputError
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan


@noun
class Replan:
    """A plan for the tasks that are here now, and how it came about.

    `kept`: the plan in force stands, with no more changes than arrivals and departures force. `moved` are tasks that stayed
    and now share their hTask with others of those that stayed. `before` and `after` are the goal's cost (iteration time in ns,
    by default) of that plan and of the other one that was judged; None where there was none. They come from the simulator
    where the state has one (`judged_by`), otherwise from the time of the eager template. `surrogate_*_ns` are the same two
    plans on the planners' objective. `cached` says that the answer was known; nothing else depends on it.
    """

    plan: Plan
    kept: bool
    reason: str
    arrived: tuple[str, ...]
    left: tuple[str, ...]
    moved: tuple[str, ...]
    moves: int
    judged_by: str
    before: float | None
    after: float | None
    surrogate_before_ns: int | None
    surrogate_after_ns: int | None
    cached: bool


Cache = PlanCache[Answer]


def replan(
    policy: Policy, state: SystemState, config: ReplanConfig | None = None, cache: Cache | None = None
) -> Replan:
    """The next plan of `state.workload`, from `state.current` (None: the policy plans anew).

    The layout and C of the plan in force stay, unless the policy is asked for a new plan: then the state's hold. A plan in
    force that is not one shared instance with evenly spread samples cannot be changed task by task; the policy is asked.

    Raises:
        InputError: the plan in force is for another model or cluster.
        InfeasibleError: neither the plan in force with its arrivals nor a new one fits.
    """
    options = config or ReplanConfig()
    _require_same_place(state)
    question, names = question_of(state)
    asked = replace(state, workload=question.workload, current=None)
    place = (state.cluster, state.layout, state.microbatches, state.choices, state.seed, state.goal)
    key = (type(policy), repr(policy.config), policy.cost, state.evaluate, options, place, question)
    answer = cache.get(key) if cache is not None else None
    cached = answer is not None
    if answer is None:
        answer = decide(policy, asked, question, options)
        if cache is not None:
            cache.put(key, answer)
    plan = renamed(answer.plan, names, state.workload)
    changed = change(state)
    return Replan(
        plan=plan,
        kept=answer.kept,
        reason=answer.reason,
        arrived=changed.arrived,
        left=changed.left,
        moved=_moved(state.current, plan, changed),
        moves=answer.moves,
        judged_by=answer.judged_by,
        before=answer.before,
        after=answer.after,
        surrogate_before_ns=answer.surrogate_before_ns,
        surrogate_after_ns=answer.surrogate_after_ns,
        cached=cached,
    )


def _require_same_place(state: SystemState) -> None:
    if state.current is None:
        return
    current = state.current
    if current.workload.model != state.workload.model:
        raise InputError(
            f"the plan in force is for model {current.workload.model.name}, the workload for "
            f"{state.workload.model.name}: plan without it"
        )
    if current.cluster != state.cluster:
        raise InputError(
            f"the plan in force is for cluster {current.cluster.name}, not for {state.cluster.name}: plan without it"
        )


def _moved(current: Plan | None, plan: Plan, changed: Change) -> tuple[str, ...]:
    if current is None:
        return ()
    gone = frozenset((*changed.left, *changed.arrived))
    before, after = _company(current, gone), _company(plan, gone)
    return tuple(sorted(t for t in after if after[t] != before.get(t)))


def _company(plan: Plan, gone: frozenset[str]) -> dict[str, frozenset[str]]:
    """Who shares an hTask with each task, of those that stayed."""
    groups = [frozenset(h.tasks) - gone for i in plan.instances for h in i.htasks]
    return {t: group for group in groups for t in group}
