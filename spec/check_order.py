"""check, order: every reason why the order of a stage cannot be run: completeness, dependencies of chunks, steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from muxtune.spec.bind import stage_orders
from muxtune.spec.order import ChunksOf, chunks_of
from muxtune.spec.plan import Instance, OrderKey, StageOrder


def check_orders(instance: Instance) -> Iterator[str]:
    """Each stage runs each chunk of each unit forward once, then backward once, for each step; steps come after them."""
    name = f"instance {instance.name}"
    units = {(b, u) for b, bucket in enumerate(instance.buckets) for u in range(len(bucket.units))}
    if instance.feed and (len(instance.feed) != len(units) or set(instance.feed) != units):
        yield f"{name}: feed must name each of the {len(units)} units exactly once"
        return
    stages = [o.stage for o in stage_orders(instance)]
    if stages != list(range(instance.layout.pp)):
        yield f"{name}: orders are for stages {stages}, expected one for each of 0..{instance.layout.pp - 1}"
        return
    for replica in range(instance.layout.dp):
        chunks = {key: k for key, k in chunks_of(instance).items() if instance.on_replica(key[1], replica)}
        for order in stage_orders(instance, replica):
            yield from _stage_order(instance, order, chunks)


def _stage_order(instance: Instance, order: StageOrder, chunks: ChunksOf) -> Iterator[str]:
    """One stage of one replica, which computes the units that `chunks` names."""
    name = f"instance {instance.name}: stage {order.stage}"
    seen = Counter((a.op, a.bucket, a.unit, a.chunk, a.step) for a in order.actions if a.op != "step")
    wanted = {
        (op, b, u, j, s)
        for op in ("forward", "backward")
        for (b, u), count in chunks.items()
        for j in range(count)
        for s in range(instance.steps)
    }
    for op, b, u, j, s in sorted(wanted - set(seen)):
        yield f"{name} never runs the {op} of {_unit_name(chunks, (b, u), j)} (step {s})"
    for (op, b, u, j, s), count in sorted(seen.items()):
        if count > 1 or (op, b, u, j, s) not in wanted:
            yield f"{name} runs the {op} of {_unit_name(chunks, (b, u), j)} (step {s}) {count} times"
    for task in sorted({a.task for a in order.actions if a.op == "step"} - set(instance.tasks)):
        yield f"{name} steps task {task}, which the instance does not hold"
    yield from (f"{name}: {problem}" for problem in _dependencies(order, chunks))
    yield from (f"{name}: {problem}" for problem in _in_flight(order, chunks))
    yield from (f"{name}: {problem}" for problem in _steps(instance, order))


def _dependencies(order: StageOrder, chunks: ChunksOf) -> Iterator[str]:
    """A backward follows its forward; forward of chunk j needs chunk j−1's KV, backward of chunk j chunk j+1's dKV."""
    place = {(a.op, a.bucket, a.unit, a.chunk, a.step): i for i, a in enumerate(order.actions) if a.op != "step"}
    for (op, b, u, j, s), index in place.items():
        unit = _unit_name(chunks, (b, u), j)
        if op == "backward" and place.get(("forward", b, u, j, s), -1) > index:
            yield f"backward of {unit} stands before its forward"
        if op == "forward" and place.get((op, b, u, j - 1, s), -1) > index:
            yield f"forward of {unit} stands before that of chunk {j - 1}, whose KV it needs"
        if op == "backward" and place.get((op, b, u, j + 1, s), -1) > index:
            yield f"backward of {unit} stands before that of chunk {j + 1}, whose dKV it needs"


def _in_flight(order: StageOrder, chunks: ChunksOf) -> Iterator[str]:
    """A unit of K chunks has all of them in flight before its first backward."""
    inside: Counter[tuple[int, int, int]] = Counter()
    turned: set[tuple[int, int, int]] = set()
    for action in order.actions:
        key = (action.bucket, action.unit, action.step)
        if action.op == "forward":
            inside[key] += 1
        elif action.op == "backward" and key not in turned:
            turned.add(key)
            count = chunks.get(key[:2], 1)
            if 0 < inside[key] < count:
                yield (
                    f"unit {key[1]} of bucket {key[0]} turns back with {inside[key]} of its {count} chunks in flight: "
                    f"it needs all {count}"
                )


def _steps(instance: Instance, order: StageOrder) -> Iterator[str]:
    """A task's step stands after its backwards of that step and before its forwards of the next."""
    holds = {
        (b, u): tuple(dict.fromkeys(p.task for p in unit.parts))
        for b, bucket in enumerate(instance.buckets)
        for u, unit in enumerate(bucket.units)
    }
    steps: dict[str | None, list[int]] = {task: [] for task in instance.tasks}
    first: dict[tuple[str, int], int] = {}
    last: dict[tuple[str, int], int] = {}
    for index, action in enumerate(order.actions):
        if action.op == "step":
            steps.setdefault(action.task, []).append(index)
            continue
        for task in holds.get((action.bucket, action.unit), ()):
            first.setdefault((task, action.step), index)
            last[task, action.step] = index
    for task in instance.tasks:
        if len(steps[task]) != instance.steps:
            yield f"task {task} steps {len(steps[task])} times, the order covers {instance.steps}"
            continue
        for s, at in enumerate(steps[task]):
            if last.get((task, s), at) > at:
                yield f"step {s} of task {task} stands before one of its backwards"
            if first.get((task, s + 1), at) < at:
                yield f"a forward of task {task} of step {s + 1} stands before step {s}"


def _unit_name(chunks: ChunksOf, key: OrderKey, chunk: int) -> str:
    """`unit 1 of bucket 0`, with its chunk where the unit is cut (or is said to be)."""
    name = f"unit {key[1]} of bucket {key[0]}"
    return f"chunk {chunk} of {name}" if chunk or chunks.get(key, 1) > 1 else name
