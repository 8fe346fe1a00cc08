"""Decide: carry the plan in force on, or take another that pays for the change."""

from __future__ import annotations

import math

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.objectives.base import THROUGHPUT, WORST
from muxtune.policies.online.config import ReplanConfig
from muxtune.policies.online.options import Option, from_the_plan_in_force, from_the_policy
from muxtune.policies.online.question import Question
from muxtune.spec.check import check
from muxtune.spec.errors import InfeasibleError, InputError, NoAnswerError
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan
from muxtune.spec.units import format_ns


@noun
class Answer:
    """What is decided, in canonical names; the fields are those of `Replan`."""

    plan: Plan
    kept: bool
    reason: str
    judged_by: str
    moves: int = 0
    before: float | None = None
    after: float | None = None
    surrogate_before_ns: int | None = None
    surrogate_after_ns: int | None = None


@noun
class _Judged:
    """How far the most slowed task is above the cap, and the goal's cost."""

    excess: float
    cost: float


def decide(policy: Policy, state: SystemState, question: Question, config: ReplanConfig) -> Answer:
    """The answer to a question, on which `state` is asked in canonical names, without a plan in force.

    Raises:
        InputError: the goal is one that only a simulator can judge, and there is none.
        InfeasibleError: no plan can be executed.
    """
    if state.evaluate is None and state.goal != THROUGHPUT:
        raise InputError(f"objective {state.goal.objective} is judged by the simulator: give SystemState an `evaluate`")
    carried, other = from_the_plan_in_force(policy, state, question, config)
    if carried is not None and config.full:
        try:
            other = from_the_policy(policy, state)
        except NoAnswerError:
            other = None
    before = None if carried is None else _judge(state, carried)
    after = None if other is None else _judge(state, other)
    # The simulator has refused what cannot be executed; without one it is looked for in the plan that is chosen.
    while before is not None or after is not None:
        kept, reason = _verdict(before, after, config, state.goal.objective)
        chosen = carried if kept else other
        assert chosen is not None
        if state.evaluate is not None or not check(chosen.plan):
            return _answer(state, chosen, (carried, other), (before, after), kept=kept, reason=reason)
        before, after = (None, after) if kept else (before, None)
    return _anew(policy, state, question)


def _answer(
    state: SystemState,
    chosen: Option,
    options: tuple[Option | None, Option | None],
    judged: tuple[_Judged | None, _Judged | None],
    *,
    kept: bool,
    reason: str,
) -> Answer:
    (carried, other), (before, after) = options, judged
    return Answer(
        plan=chosen.plan,
        kept=kept,
        reason=reason,
        judged_by=_judged_by(state),
        moves=chosen.moves,
        before=None if before is None else _known(before.cost),
        after=None if after is None else _known(after.cost),
        surrogate_before_ns=None if carried is None else carried.surrogate_ns,
        surrogate_after_ns=None if other is None else other.surrogate_ns,
    )


def _judged_by(state: SystemState) -> str:
    return "template" if state.evaluate is None else "simulator"


def _known(cost: float) -> float | None:
    return None if cost == WORST else cost


def _anew(policy: Policy, state: SystemState, question: Question) -> Answer:
    """The policy's plan, where there is nothing that could be carried on; or what cannot be judged, if it may stay."""
    judged_by = _judged_by(state)
    if question.unchanged is not None and not check(question.unchanged):
        reason = "nothing arrived or left, and nothing can be said of the plan in force without a simulator"
        return Answer(plan=question.unchanged, kept=True, reason=reason, judged_by=judged_by)
    found = from_the_policy(policy, state)
    if question.made_by is None:
        reason = "no plan was in force"
    elif question.carried is None:
        reason = "the plan in force cannot be changed task by task: the policy planned anew"
    else:
        reason = "the plan in force cannot hold who is here now: the policy planned anew"
    if problems := check(found.plan):
        raise InfeasibleError(f"{reason}; its plan cannot be executed: {problems[0]}")
    judged = _judge(state, found)
    return Answer(
        plan=found.plan,
        kept=False,
        reason=reason,
        judged_by=judged_by,
        after=None if judged is None else _known(judged.cost),
        surrogate_after_ns=found.surrogate_ns,
    )


def _verdict(before: _Judged | None, after: _Judged | None, config: ReplanConfig, objective: str) -> tuple[bool, str]:
    """(whether the plan in force stays, why); at least one of the two is there."""
    if after is None:
        return True, "no other plan was found"
    if before is None:
        return False, "the plan in force cannot hold who is here now"
    if after.excess != before.excess:
        kept = before.excess < after.excess
        return kept, f"{'the plan in force' if kept else 'another plan'} keeps closer to the slowdown cap"
    saved = 1 - after.cost / before.cost if 0 < before.cost < math.inf else 0.0
    if saved <= 0:
        return True, "the plan found is no better"
    saved_ns = round(saved * config.horizon_ns)
    text = (
        f"{100 * saved:.2f} % better ({objective}) saves {format_ns(saved_ns)} of {format_ns(config.horizon_ns)}, "
        f"a re-plan costs {format_ns(config.replan_cost_ns)}"
    )
    return saved_ns <= config.replan_cost_ns, text


def _judge(state: SystemState, option: Option) -> _Judged | None:
    """None for a plan that cannot be executed, or whose time is not known."""
    if state.evaluate is None:
        if option.template_ns is None:
            return None
        return _Judged(excess=0.0, cost=option.template_ns)
    try:
        found = state.evaluate(option.plan)
    except NoAnswerError:
        return None
    return _Judged(excess=state.goal.excess(found), cost=state.goal.cost(option.plan.workload, found))
