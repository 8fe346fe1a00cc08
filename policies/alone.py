"""Slowdowns: every task's time from step to step, against the task alone on the same devices (one backbone, 1F1B)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from muxtune.policies.base import Evaluate, SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.errors import NoAnswerError
from muxtune.spec.estimate import Estimate
from muxtune.spec.layout import LayoutChoice
from muxtune.spec.plan import Instance, Plan
from muxtune.spec.task import Task


class Alone:
    """Iteration times of tasks that have the devices for themselves; equal tasks are planned once.

    Without `choices` a task runs alone under the layout and C that the plan gives it. With them it runs under the best of
    them whatever the plan does, so that plans of different layouts are held against one figure.
    """

    def __init__(self, evaluate: Evaluate, choices: Sequence[LayoutChoice] = ()) -> None:
        self.evaluate, self.choices = evaluate, tuple(choices)
        self._known: dict[object, int | None] = {}

    def slowdowns(self, plan: Plan, found: Estimate) -> Estimate:
        """The estimate of a plan with the slowdown of every task; None for a task that cannot run alone."""
        homes = {task: i for i in plan.instances for task in i.tasks}
        rows = []
        for row in found.per_task:
            alone_ns = self._iteration_ns(plan, plan.workload.task(row.task), homes[row.task])
            period_ns = row.period_ns if row.period_ns is not None else found.iteration_ns
            rows.append(replace(row, slowdown=period_ns / alone_ns if alone_ns else None))
        return replace(found, per_task=tuple(rows))

    def _iteration_ns(self, plan: Plan, task: Task, home: Instance) -> int | None:
        own = LayoutChoice(layout=home.layout, microbatches=home.microbatches)
        times = [self._time_ns(plan, task, choice) for choice in self.choices or (own,)]
        return min((t for t in times if t is not None), default=None)

    def _time_ns(self, plan: Plan, task: Task, choice: LayoutChoice) -> int | None:
        """None where the task alone has no feasible plan, or the cost model no figure for it."""
        key = (task.peft, task.billed_len_tokens, task.global_batch_samples, choice, plan.cluster)
        if key not in self._known:
            try:
                self._known[key] = self.evaluate(_single(plan, task, choice)).iteration_ns
            except NoAnswerError:
                self._known[key] = None
        return self._known[key]


def _single(plan: Plan, task: Task, choice: LayoutChoice) -> Plan:
    workload = replace(plan.workload, tasks=(task,))
    state = SystemState(workload=workload, cluster=plan.cluster, layout=choice.layout, microbatches=choice.microbatches)
    instance = make_instance(state, task.task_id, [[task.task_id]], [[0]])
    return Plan(workload=workload, cluster=plan.cluster, instances=(instance,))


def with_slowdowns(evaluate: Evaluate, choices: Sequence[LayoutChoice] = ()) -> Evaluate:
    """`evaluate`, its estimates with slowdowns: what a state needs whose goal reads them."""
    alone = Alone(evaluate, choices)

    def judged(plan: Plan) -> Estimate:
        return alone.slowdowns(plan, evaluate(plan))

    return judged
