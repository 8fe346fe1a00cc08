"""lorafusion: paired adapters, samples packed into token-bounded micro-batches, drains filled (LoRAFusion, EuroSys'26).

Source: arXiv 2510.00206, its scheduler. Simplified here: a Plan stands for every draw, so a sample slot counts with its task's
mean length (`lengths=drawn`: with the samples of the seed's first step); leftovers are not merged across global batches; pairs
have no tolerance; the kernel's tiles are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_plan, mean_length, require_feasible
from muxtune.policies.packing import Packing, first_fit_decreasing, pack
from muxtune.spec.align import truncate
from muxtune.spec.draw import draw_samples
from muxtune.spec.noun import noun
from muxtune.spec.order import one_f_one_b
from muxtune.spec.plan import Action, Bucket, HTask, Instance, OrderKey, Part, Plan, SolverRecord, StageOrder, Unit
from muxtune.spec.task import Task

Lengths = Literal["mean", "drawn"]
PackingMode = Literal["exact", "greedy"]
#: (task, slot, tokens) of one sample slot.
Item = tuple[str, int, int]


@noun
class LoRAFusionConfig:
    """`capacity_tokens` bounds a micro-batch; without it, the largest group's tokens over the state's C, and no less than
    the longest sample. `steps` is the number of optimizer steps an order covers: each but the last drains under the next.
    `packing=exact` searches beyond first-fit-decreasing where that is not proven least."""

    capacity_tokens: int | None = None
    steps: int = 2
    packing: PackingMode = "exact"
    lengths: Lengths = "mean"

    def __post_init__(self) -> None:
        if self.packing not in get_args(PackingMode):
            raise ValueError(f"packing={self.packing!r}: known are {list(get_args(PackingMode))}")
        if self.lengths not in get_args(Lengths):
            raise ValueError(f"lengths={self.lengths!r}: known are {list(get_args(Lengths))}")
        if self.steps < 1 or (self.capacity_tokens is not None and self.capacity_tokens < 1):
            raise ValueError(f"steps={self.steps}, capacity_tokens={self.capacity_tokens}: must be at least 1")


class LoRAFusion(Policy):
    """One hTask and one bucket a pair; flat tokens; 1F1B over the pairs in turn, several optimizer steps without a flush."""

    Config = LoRAFusionConfig

    def plan(self, state: SystemState) -> Plan:
        """One shared instance.

        Raises:
            InfeasibleError: the micro-batches in flight do not fit.
        """
        items = self._items(state)
        groups = pairs({task: sum(t for _, _, t in found) / len(found) for task, found in items.items()})
        groups = sorted(groups, key=lambda g: (-sum(t for task in g for _, _, t in items[task]), g))
        packings, units = [], []
        for index, group in enumerate(groups):
            samples = [item for task in group for item in items[task]]
            packing = self._pack([tokens for _, _, tokens in samples], self._capacity(state, items, groups))
            packings.append(packing)
            units.append(tuple(_unit(index, [samples[i] for i in b]) for b in packing.bins))
        instance = Instance(
            name="shared",
            devices=tuple(range(state.layout.ranks)),
            layout=state.layout,
            htasks=tuple(HTask(tasks=g, alignment="varlen") for g in groups),
            buckets=tuple(Bucket(htasks=(g,), units=made) for g, made in enumerate(units)),
            microbatches=max(map(len, units)),
            order="explicit",
            orders=drained_under_each_other(groups, [len(u) for u in units], state, self.config.steps),
            steps=self.config.steps,
        )
        return require_feasible(make_plan(self, "lorafusion", state, [instance], _record(packings)))

    def _items(self, state: SystemState) -> dict[str, list[Item]]:
        """Sample slots of every task with the length they are packed by."""
        if self.config.lengths == "drawn":
            draw = draw_samples(state.workload, state.seed)
            return {
                t.task_id: [
                    (t.task_id, slot, _drawn_tokens(t, x.prompt_tokens, x.response_tokens))
                    for slot, x in enumerate(draw.of(t.task_id, 0))
                ]
                for t in state.workload.tasks
            }
        means = {t.task_id: mean_length(state.workload, t.task_id) for t in state.workload.tasks}
        slots = {t.task_id: range(t.global_batch_samples) for t in state.workload.tasks}
        return {task: [(task, slot, means[task]) for slot in slots[task]] for task in means}

    def _capacity(self, state: SystemState, items: dict[str, list[Item]], groups: Sequence[tuple[str, ...]]) -> int:
        longest = max(tokens for found in items.values() for _, _, tokens in found)
        given: int | None = self.config.capacity_tokens
        if given is not None:
            return max(longest, given)
        largest = max(sum(t for task in g for _, _, t in items[task]) for g in groups)
        return max(longest, -(-largest // state.microbatches))

    def _pack(self, sizes: Sequence[int], capacity: int) -> Packing:
        return pack(sizes, capacity) if self.config.packing == "exact" else first_fit_decreasing(sizes, capacity)


def pairs(mean_tokens: dict[str, float]) -> list[tuple[str, ...]]:
    """Groups of at most two: the shortest with the longest, and so on inwards; ties by id."""
    order = sorted(mean_tokens, key=lambda t: (mean_tokens[t], t))
    half = len(order) // 2
    paired: list[tuple[str, ...]] = [(order[i], order[-1 - i]) for i in range(half)]
    return paired + ([(order[half],)] if len(order) % 2 else [])


def drained_under_each_other(
    groups: Sequence[tuple[str, ...]], units: Sequence[int], state: SystemState, steps: int
) -> tuple[StageOrder, ...]:
    """1F1B over `steps` passes of all groups without a flush (the bubble rule).

    Micro-batches of a group's next step enter S places after its last of this step at the earliest, so that its backwards are
    done on every stage; places that no other group fills stay empty. With dp replicas a place is one unit of each replica.

    A step is a meeting of all stages. Stage s is 2j + 2S − s clocks old after backward j, if both directions take one clock:
    it steps s/2 places (rounded up) after stage 0, and stage 0 in the middle of the time that it has, so that none waits long.
    """
    stages, replicas = state.layout.pp, state.layout.dp
    places: list[tuple[int, OrderKey] | None] = []
    last: dict[int, int] = {}
    stepped: dict[int, list[tuple[int, int]]] = {}  # place → (group, step) that stage 0 takes after its backward
    for step in range(steps):
        for group, count in enumerate(units):
            if step:
                places += [None] * (last[group] + stages - len(places))
                middle = (last[group] + len(places) - stages) // 2
                stepped.setdefault(middle, []).append((group, step - 1))
            places += [(step, (group, row)) for row in range(-(-count // replicas))]
            last[group] = len(places) - 1
    orders = []
    for order in one_f_one_b([(p, 0) for p in range(len(places))], stages):
        actions: list[Action] = []
        for action in order.actions:
            if (place := places[action.bucket]) is not None:
                step, (group, row) = place
                rows = range(row * replicas, min(units[group], (row + 1) * replicas))
                actions += [Action(op=action.op, bucket=group, unit=u, step=step) for u in rows]
            if action.op == "backward":
                for group, step in stepped.get(action.bucket - (order.stage + 1) // 2, ()):
                    actions += _steps(groups[group], step)
        actions += (x for group in groups for x in _steps(group, steps - 1))
        orders.append(StageOrder(stage=order.stage, actions=tuple(actions)))
    return tuple(orders)


def _steps(group: Sequence[str], step: int) -> Iterator[Action]:
    return (Action(op="step", task=task, step=step) for task in group)


def _drawn_tokens(task: Task, prompt_tokens: int, response_tokens: int) -> int:
    return sum(truncate(prompt_tokens, response_tokens, task.billed_len_tokens))


def _unit(htask: int, items: Sequence[Item]) -> Unit:
    slots: dict[str, list[int]] = {}
    for task, slot, _ in items:
        slots.setdefault(task, []).append(slot)
    return Unit(parts=tuple(Part(htask=htask, task=task, slots=tuple(sorted(s))) for task, s in slots.items()))


def _record(packings: Sequence[Packing]) -> SolverRecord:
    bins, bound = sum(len(p.bins) for p in packings), sum(p.bound for p in packings)
    proven = "proven fewest" if bins == bound else f"at least {bound} are needed"
    return SolverRecord(
        name="sample-packing",
        status=f"{bins} micro-batches for {len(packings)} groups, {proven}",
        evaluations=sum(p.nodes for p in packings),
    )
