"""bind(plan, draw) → Program: no cost model, no choice; every decision was made in the Plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain

from muxtune.spec.align import Batch, Row
from muxtune.spec.draw import Draw, align_chunks, align_sample, draw_samples
from muxtune.spec.errors import PlanError
from muxtune.spec.isolated import launched_subgraphs
from muxtune.spec.order import chunks_of, feed_of, gpipe, one_f_one_b
from muxtune.spec.plan import Action, Bucket, Instance, Launch, LaunchList, Plan, StageOrder, Unit
from muxtune.spec.program import Bound, Instruction, Program, RankProgram, StageLaunches, UnitKey, UnitWork


def bind(plan: Plan, *, seed: int, steps: int | None = None, first_step: int = 0) -> Bound:
    """Draw samples with `seed` and compile the plan for `steps` optimizer steps of every task.

    Without `steps`, for the fewest that its orders cover: one, unless an explicit order covers several.
    """
    covered = math.lcm(*(i.steps for i in plan.instances)) if steps is None else steps
    return bind_draw(plan, draw_samples(plan.workload, seed, covered, first_step), first_step)


def bind_draw(plan: Plan, draw: Draw, first_step: int = 0) -> Bound:
    """Compile a plan for a given draw.

    Raises:
        PlanError: an explicit order covers a number of steps that does not divide the draw's, or a unit states another
            number of chunks than its packs have.
    """
    units: list[UnitWork] = []
    # Instances that run at once have a list each on their devices, all others share one.
    lanes = [index if plan.sharing == "corun" else 0 for index in range(len(plan.instances))]
    lists: dict[int, dict[int, list[Instruction]]] = {device: {} for i in plan.instances for device in i.devices}
    tags = _Tags()
    for instance in plan.instances:
        if draw.steps % instance.steps:
            raise PlanError(
                f"instance {instance.name}: its order covers {instance.steps} steps, which does not divide {draw.steps}"
            )
    for step in range(draw.steps):
        for index, instance in enumerate(plan.instances):
            if step % instance.steps:
                continue
            works = {
                w.key: w for s in range(instance.steps) for w in _unit_works(plan, draw, index, step + s, first_step)
            }
            units += works.values()
            layout = instance.layout
            tokens = {key: sum(layout.shard_tokens(b.tokens) for b in w.batches) for key, w in works.items()}
            orders = [stage_orders(instance, replica) for replica in range(layout.dp)]
            for rank, device in enumerate(instance.devices):
                mine = lists[device].setdefault(lanes[index], [])
                order = orders[layout.replica_of(rank)][layout.stage_of(rank)]
                mine += _rank_instructions(plan, index, rank, step, order, tokens, tags)
    program = Program(
        plan_digest=plan.decision_digest(),
        seed=draw.seed,
        steps=draw.steps,
        ranks=tuple(_rank_program(device, list(lists[device].values())) for device in sorted(lists)),
        units=tuple(units),
        launches=tuple(_all_launches(plan)),
    )
    return Bound(plan=plan, program=program)


def _rank_program(device: int, lists: Sequence[Sequence[Instruction]]) -> RankProgram:
    starts = tuple(accumulate(map(len, lists[:-1]), initial=0))
    return RankProgram(rank=device, instructions=tuple(chain.from_iterable(lists)), starts=starts)


def stage_orders(instance: Instance, replica: int = 0) -> tuple[StageOrder, ...]:
    """The explicit order of every stage of one replica, whatever way the plan states it; steps come last unless placed."""
    if instance.order == "explicit":
        listed = sorted(instance.orders, key=lambda o: o.stage)
        mine = (tuple(a for a in o.actions if a.op == "step" or instance.on_replica(a.unit, replica)) for o in listed)
        orders = tuple(StageOrder(stage=o.stage, actions=actions) for o, actions in zip(listed, mine, strict=True))
    else:
        make = one_f_one_b if instance.order == "1f1b" else gpipe
        feed = [key for key in feed_of(instance) if instance.on_replica(key[1], replica)]
        orders = make(feed, instance.layout.pp, chunks=chunks_of(instance))
    if any(a.op == "step" for o in orders for a in o.actions):
        return orders
    steps = tuple(Action(op="step", task=task, step=instance.steps - 1) for task in instance.tasks)
    return tuple(StageOrder(stage=o.stage, actions=o.actions + steps) for o in orders)


def _unit_works(plan: Plan, draw: Draw, index: int, step: int, first_step: int) -> Iterator[UnitWork]:
    instance = plan.instances[index]
    for b, bucket in enumerate(instance.buckets):
        for u, unit in enumerate(bucket.units):
            aligned = [_batches(plan, draw, instance, unit, h, first_step + step) for h in bucket.htasks]
            chunks = max(map(len, aligned))
            if chunks != unit.chunks:
                raise PlanError(
                    f"instance {instance.name}: unit {u} of bucket {b} states {unit.chunks} chunks, its packs have {chunks}"
                )
            for j in range(chunks):
                key = UnitKey(step=step, instance=index, bucket=b, unit=u, chunk=j)
                batches = (batches[j] for batches in aligned if j < len(batches))
                yield UnitWork(key=key, batches=tuple(x for x in batches if x.rows))


def _batches(plan: Plan, draw: Draw, instance: Instance, unit: Unit, htask: int, step: int) -> tuple[Batch, ...]:
    """The rows of one hTask in each chunk of a unit, tasks in hTask order, so that each task's tokens are contiguous."""
    group = instance.htasks[htask]
    tasks = [plan.workload.task(t) for t in group.tasks]
    longest = max(t.billed_len_tokens for t in tasks)
    rows: list[list[Row]] = [[]]
    for task in tasks:
        samples = draw.of(task.task_id, step)
        slots = [s for p in unit.parts if p.htask == htask and p.task == task.task_id for s in p.slots]
        if group.alignment != "chunk":
            rows[0] += [align_sample(task, s, samples[s], group.alignment, longest) for s in slots]
            continue
        for j, chunk in enumerate(align_chunks(task, slots, [samples[s] for s in slots], group.chunk_tokens, longest)):
            rows += [[] for _ in range(j + 1 - len(rows))]
            rows[j] += chunk
    return tuple(Batch(htask=htask, rows=tuple(r)) for r in rows)


class _Tags:
    """Hands out one message number for each (unit, boundary, payload, tp and dp lane), whichever end asks first."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[UnitKey, int, str, int], int] = {}

    def of(self, key: UnitKey, boundary: int, payload: str, lane: int) -> int:
        return self.numbers.setdefault((key, boundary, payload, lane), len(self.numbers) + 1)


def _rank_instructions(
    plan: Plan, index: int, rank: int, step: int, order: StageOrder, tokens: dict[UnitKey, int], tags: _Tags
) -> Iterator[Instruction]:
    """The instructions of one rank for one pass over its stage's order; `tokens` are those of a unit's residual stream."""
    instance = plan.instances[index]
    layout = instance.layout
    stage = layout.stage_of(rank)
    ends = {d: instance.devices[layout.rank_at(rank, stage + d)] for d in (-1, 1) if 0 <= stage + d < layout.pp}
    width_bytes = plan.workload.model.hidden * plan.workload.model.element_bytes
    for action in order.actions:
        key = UnitKey(
            step=step + action.step, instance=index, bucket=action.bucket, unit=action.unit, chunk=action.chunk
        )
        if action.op == "step":
            yield Instruction(op="step", key=key, task=action.task)
            continue
        size_bytes = tokens[key] * width_bytes
        forward = action.op == "forward"
        payload, source, target = ("activation", -1, 1) if forward else ("gradient", 1, -1)
        for side, op in ((source, "recv"), (0, action.op), (target, "send")):
            if side == 0:
                yield Instruction(op=action.op, key=key)
            elif side in ends:
                tag = tags.of(key, min(stage, stage + side), payload, layout.rank_at(rank, 0))
                yield Instruction(op=op, key=key, peer=ends[side], tag=tag, payload=payload, size_bytes=size_bytes)  # type: ignore[arg-type]


def serial_launches(instance: Instance, bucket: Bucket, stage: int) -> Iterator[LaunchList]:
    """One hTask after the other; collectives on the communication stream."""
    for direction in ("forward", "backward"):
        isolated = bucket.adapter_fusion == "bucket"
        subgraphs = launched_subgraphs(instance.layout, stage, direction, isolated)  # type: ignore[arg-type]
        launches = tuple(
            Launch(htask=h, subgraph=s.index, stream="comm" if s.kind == "collective" else "compute")
            for h in bucket.htasks
            for s in subgraphs
        )
        yield LaunchList(stage=stage, direction=direction, launches=launches)  # type: ignore[arg-type]


def _all_launches(plan: Plan) -> Iterable[StageLaunches]:
    for i, instance in enumerate(plan.instances):
        for b, bucket in enumerate(instance.buckets):
            for stage in range(instance.layout.pp):
                stated = {x.direction: x for x in bucket.launches if x.stage == stage}
                for serial in serial_launches(instance, bucket, stage):
                    x = stated.get(serial.direction, serial)
                    yield StageLaunches(instance=i, bucket=b, stage=stage, direction=x.direction, launches=x.launches)
