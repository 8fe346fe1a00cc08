"""The plans that may be next: the one in force with no more than arrivals and departures force, it improved, a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.candidates import Builder, Candidate, candidate_of
from muxtune.policies.online.arrange import arranged
from muxtune.policies.online.config import ReplanConfig
from muxtune.policies.online.grouping import Grouping, Placed, Placing
from muxtune.policies.online.question import Question
from muxtune.spec.errors import NoAnswerError
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan, SolverRecord


@noun
class Option:
    """A plan that may be next. `template_ns` is the time of its eager template, `surrogate_ns` the planners' objective.

    None where its samples are placed so that neither is defined. `moves` improving moves led to it.
    """

    plan: Plan
    template_ns: int | None = None
    surrogate_ns: int | None = None
    moves: int = 0


def from_the_policy(policy: Policy, state: SystemState) -> Option:
    """The policy's own plan.

    Raises:
        NoAnswerError: it has none.
    """
    plan = policy.plan(state)
    candidate = candidate_of(plan)
    if candidate is None:
        return Option(plan=plan)
    builder, grouping = _tools(policy, state, candidate, 0)
    built = builder.build(candidate)
    placing = _placing(grouping, candidate, ())
    return Option(
        plan=plan,
        template_ns=None if built is None else built.makespan_ns,
        surrogate_ns=grouping.value_ns(placing) if grouping.admits(placing) else None,
    )


def from_the_plan_in_force(
    policy: Policy, state: SystemState, question: Question, config: ReplanConfig
) -> tuple[Option | None, Option | None]:
    """(the plan in force with those who are here now, the same after improving moves).

    The first is None where it cannot be changed task by task, or cannot hold who arrived; the second where no move improves.
    """
    origin = question.carried
    if origin is None:
        return (None if question.unchanged is None else Option(plan=question.unchanged)), None
    try:
        return _changed(policy, state, question, origin, config)
    except NoAnswerError:
        return None, None


def _changed(
    policy: Policy, state: SystemState, question: Question, origin: Candidate, config: ReplanConfig
) -> tuple[Option | None, Option | None]:
    builder, grouping = _tools(policy, state, origin, config.groups)
    placing = _placing(grouping, origin, question.touched)
    placed = {t for p in placing for t in p.tasks}
    arrived = [t.task_id for t in question.workload.tasks if t.task_id not in placed]
    inserted = grouping.insert(placing, arrived) if grouping.admits(placing) else None
    if inserted is None:
        return None, None
    carried = _option(builder, grouping, question, origin, inserted)
    if question.unchanged is not None:
        # Nobody came or went: every hTask may be improved, and the plan in force stays what it is to the byte.
        carried = None if carried is None else replace(carried, plan=question.unchanged)
        inserted = tuple(replace(p, touched=True) for p in inserted)
    if config.full:
        return carried, None
    improved, moves = grouping.improve(inserted, config.moves)
    other = _option(builder, grouping, question, origin, improved, moves, balanced=True)
    return carried, other


def _tools(policy: Policy, state: SystemState, candidate: Candidate, groups: int) -> tuple[Builder, Grouping]:
    """What builds plans of a candidate's layout and C, and what prices its hTasks."""
    choice = candidate.choice
    own = replace(state, layout=choice.layout, microbatches=choice.microbatches, choices=())
    builder = Builder(policy, "online", own)
    return builder, Grouping(builder.surrogate(own, candidate), groups)


def _placing(grouping: Grouping, candidate: Candidate, touched: Sequence[tuple[str, ...]]) -> Placing:
    return tuple(
        Placed(tasks=grouping.sorted(h), bucket=b, touched=tuple(sorted(h)) in touched)
        for b, bucket in enumerate(candidate.buckets)
        for h in bucket
    )


def _option(
    builder: Builder,
    grouping: Grouping,
    question: Question,
    origin: Candidate,
    placing: Placing,
    moves: int = 0,
    balanced: bool = False,
) -> Option | None:
    """The plan of a placing; None if its units do not fit."""
    built = arranged(builder, grouping.surrogate, origin, placing, balanced)
    if built is None or question.made_by is None:
        return None
    value_ns = grouping.value_ns(placing)
    record = SolverRecord(
        name="online",
        status=f"the plan in force, changed; {moves} improving moves",
        value_ns=value_ns,
        evaluations=grouping.surrogate.priced,
    )
    made_by = replace(question.made_by, solver=record, cost_model=builder.policy.cost.model_id)
    plan = replace(built.plan, made_by=made_by)
    return Option(plan=plan, template_ns=built.makespan_ns, surrogate_ns=value_ns, moves=moves)
