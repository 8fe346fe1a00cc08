"""nemo: one backbone per task under the best layouts of a grid, in turn or side by side (MuxTune §5.1, baseline NeMo).

The paper does not say whether the baseline's tasks run one after another or beside each other: both are judged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from muxtune.policies.base import Policy, SystemState, require_evaluate
from muxtune.policies.build import make_instance, make_plan, require_feasible
from muxtune.policies.choices import layout_choices, require_choices
from muxtune.policies.hf_peft import BackbonesConfig
from muxtune.spec.errors import InfeasibleError, NoAnswerError
from muxtune.spec.layout import Layout, LayoutChoice
from muxtune.spec.noun import noun
from muxtune.spec.plan import Instance, Plan, SolverRecord
from muxtune.spec.task import Task

#: Arrangements that are judged as a whole, beside those that do not fit.
FINALISTS = 4


@noun
class _Arrangement:
    """Which choice each task takes, and on which group of devices; `expected_ns` adds up the tasks' times alone."""

    name: str
    expected_ns: int
    places: tuple[tuple[str, LayoutChoice, int], ...]


class Nemo(Policy):
    """Each task is judged alone under every layout, then three arrangements of them all.

    In turn on the same devices: each task under its own best layout, or all under one. Side by side: one layout for all, on as
    many disjoint groups of devices as fit, longest task first to the group that is free first. With
    `sharing: corun` tasks on the same devices run at once, and all have one layout. The grid is `state.choices`,
    or every layout of the cluster with the state's micro-batch count: the state's own layout is not used.
    """

    Config = BackbonesConfig
    chooses_layout = True

    def plan(self, state: SystemState) -> Plan:
        """One instance a task.

        Raises:
            InfeasibleError: no arrangement fits, with the reason of the one that was expected to be fastest.
            InputError: the state has no simulator.
        """
        evaluate = require_evaluate("nemo", state)
        choices = state.choices or require_choices(
            "nemo",
            layout_choices(state.workload, state.cluster, (state.microbatches,), recompute=state.layout.recompute),
        )
        alone, evaluations = self._alone(state, choices)
        found: list[tuple[tuple[float, ...], int, int, str, Plan]] = []
        reason = ""
        at_once = self.config.sharing == "corun"
        ranked = sorted(_arrangements(state, choices, alone, at_once), key=lambda a: (a.expected_ns, a.name))
        for index, arrangement in enumerate(ranked):
            plan = self._whole(state, arrangement)
            evaluations += 1
            try:
                judged = evaluate(require_feasible(plan))
                found.append((state.rank(judged), index, judged.iteration_ns, arrangement.name, plan))
            except NoAnswerError as error:
                reason = reason or str(error)
            if len(found) == FINALISTS:
                break
        if not found:
            raise InfeasibleError(reason or self._none_alone(state, choices))
        *_, value_ns, name, plan = min(found, key=lambda x: x[:2])
        status = f"best of {len(ranked)} arrangements by their tasks' times alone, {len(found)} judged whole: {name}"
        record = SolverRecord(name="layout-grid", status=status, value_ns=value_ns, evaluations=evaluations)
        return replace(plan, made_by=replace(plan.made_by, solver=record))

    def _alone(
        self, state: SystemState, choices: Sequence[LayoutChoice]
    ) -> tuple[dict[tuple[str, LayoutChoice], int], int]:
        """({(task, choice): iteration time of the task alone}, evaluations); what does not fit is left out."""
        evaluate = require_evaluate("nemo", state)
        known: dict[tuple[object, ...], int | None] = {}
        alone: dict[tuple[str, LayoutChoice], int] = {}
        for task in state.workload.tasks:
            for choice in choices:
                key = (task.peft, task.billed_len_tokens, task.global_batch_samples, choice)
                if key not in known:
                    try:
                        known[key] = evaluate(self._single(state, task, choice)).iteration_ns
                    except NoAnswerError:
                        known[key] = None
                if (value_ns := known[key]) is not None:
                    alone[task.task_id, choice] = value_ns
        return alone, len(known)

    def _single(self, state: SystemState, task: Task, choice: LayoutChoice) -> Plan:
        workload = replace(state.workload, tasks=(task,))
        chosen = replace(state, workload=workload, layout=choice.layout, microbatches=choice.microbatches)
        return make_plan(self, "nemo", chosen, [make_instance(chosen, task.task_id, [[task.task_id]], [[0]])])

    def _whole(self, state: SystemState, arrangement: _Arrangement) -> Plan:
        instances: list[Instance] = []
        for task_id, choice, group in arrangement.places:
            chosen = replace(state, layout=choice.layout, microbatches=choice.microbatches)
            first = group * choice.layout.ranks
            devices = tuple(range(first, first + choice.layout.ranks))
            instances.append(replace(make_instance(chosen, task_id, [[task_id]], [[0]]), devices=devices))
        plan = make_plan(self, "nemo", state, instances)
        return replace(plan, residency=self.config.residency, sharing=self.config.sharing)

    def _none_alone(self, state: SystemState, choices: Sequence[LayoutChoice]) -> str:
        """Why a task cannot even run alone: the reason under the last choice, which has the most devices."""
        for task in state.workload.tasks:
            try:
                require_feasible(self._single(state, task, choices[-1]))
            except NoAnswerError as error:
                return f"task {task.task_id} alone, {choices[-1].name}: {error}"
        return "policy nemo: some task runs under no layout that another runs under, and in turn they do not fit"


def _arrangements(
    state: SystemState, choices: Sequence[LayoutChoice], alone: Mapping[tuple[str, LayoutChoice], int], at_once: bool
) -> Iterator[_Arrangement]:
    """In turn under each task's best layout, in turn (or at once) under one layout, side by side under one layout."""
    ids = sorted(t.task_id for t in state.workload.tasks)
    if (best := _best(ids, choices, alone)) and not at_once:
        yield _packed("in turn, each task under its own best layout", best, alone, 1)
    for layout in dict.fromkeys(choice.layout for choice in choices):
        mine = [choice for choice in choices if choice.layout == layout]
        if not (best := _best(ids, mine, alone)):
            continue
        yield _packed(f"{'at once' if at_once else 'in turn'}, {layout.name} for all", best, alone, 1)
        groups = min(_groups(state, layout), len(ids))
        if groups > 1:
            shared = ", at once on each" if at_once and len(ids) > groups else ""
            yield _packed(f"{groups} side by side{shared}, {layout.name} for all", best, alone, groups)


def _groups(state: SystemState, layout: Layout) -> int:
    return state.cluster.size // layout.ranks


def _best(
    ids: Sequence[str], choices: Sequence[LayoutChoice], alone: Mapping[tuple[str, LayoutChoice], int]
) -> dict[str, LayoutChoice]:
    """The choice of least time alone for each task; empty if a task has none."""
    best: dict[str, LayoutChoice] = {}
    for task_id in ids:
        timed = [(alone[task_id, c], c.layout.ranks, i) for i, c in enumerate(choices) if (task_id, c) in alone]
        if not timed:
            return {}
        best[task_id] = choices[min(timed)[2]]
    return best


def _packed(
    name: str, best: Mapping[str, LayoutChoice], alone: Mapping[tuple[str, LayoutChoice], int], groups: int
) -> _Arrangement:
    """Longest processing time first over groups of devices."""
    loads = [0] * groups
    places: list[tuple[str, LayoutChoice, int]] = []
    for task_id in sorted(best, key=lambda t: (-alone[t, best[t]], t)):
        group = loads.index(min(loads))
        places.append((task_id, best[task_id], group))
        loads[group] += alone[task_id, best[task_id]]
    return _Arrangement(name=name, expected_ns=max(loads), places=tuple(places))
