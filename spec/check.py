"""check: every reason why a Plan, or a Program made from it, cannot be executed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

from muxtune.spec.bind import bind
from muxtune.spec.check_order import check_orders
from muxtune.spec.errors import PlanError
from muxtune.spec.isolated import launched_subgraphs
from muxtune.spec.memory import RankPeak, moment_text, rank_peaks
from muxtune.spec.plan import Instance, Plan, unit_chunks
from muxtune.spec.program import Bound, ChannelKey, Program, channel_of
from muxtune.spec.units import format_bytes
from muxtune.spec.waits import deadlock_text


def check(plan: Plan, seed: int = 0) -> tuple[str, ...]:
    """All problems of a plan, worst kind first: structure, then (if that is sound) order, channels and memory of its Program."""
    return _checked(plan, seed)[0]


def require_valid(plan: Plan, seed: int = 0, source: str = "") -> tuple[Bound, tuple[RankPeak, ...]]:
    """The Program of a valid plan over one pass of its orders, and the peak of each of its ranks.

    Raises:
        PlanError: every problem of the plan; `source`, the file that it was read from, stands before them.
    """
    problems, found = _checked(plan, seed)
    if problems or found is None:
        raise PlanError((f"{source}: " if source else "") + "; ".join(problems))
    return found


def _checked(plan: Plan, seed: int) -> tuple[tuple[str, ...], tuple[Bound, tuple[RankPeak, ...]] | None]:
    problems = [*_tasks(plan), *_names(plan), *(p for i in plan.instances for p in _instance(plan, i)), *_sharing(plan)]
    if problems:
        return tuple(problems), None
    bound = bind(plan, seed=seed, steps=math.lcm(*(i.steps for i in plan.instances)))
    peaks = rank_peaks(bound)
    return (*check_program(bound.program), *_short(bound, peaks)), (bound, peaks)


def _names(plan: Plan) -> Iterator[str]:
    """Instances have names of their own and something to do."""
    if not plan.instances:
        yield "the plan has no instances: give it at least one"
    for name, count in Counter(i.name for i in plan.instances).items():
        if count > 1:
            yield f"{count} instances are named {name!r}: give each a name of its own"
    for instance in plan.instances:
        if not instance.tasks:
            yield f"instance {instance.name} has no tasks: give it some or leave it out"


def _sharing(plan: Plan) -> Iterator[str]:
    """Instances that run at once keep their backbones, and those on one device are on the same ones, sharded alike."""
    if plan.sharing != "corun":
        return
    if plan.residency == "swapped":
        yield "sharing `corun` with residency `swapped`: instances that run at once keep their backbones; use `resident`"
    for a, b in combinations(plan.instances, 2):
        common = sorted(set(a.devices) & set(b.devices))
        if common and (a.devices, a.layout.tp) != (b.devices, b.layout.tp):
            yield (
                f"instances {a.name} and {b.name} run at once on device {common[0]}, with devices {list(a.devices)} at "
                f"tp={a.layout.tp} and {list(b.devices)} at tp={b.layout.tp}: give both the same, or use sharing `sequence`"
            )


def _tasks(plan: Plan) -> Iterator[str]:
    placed = Counter(t for i in plan.instances for t in i.tasks)
    for task in plan.workload.tasks:
        if placed[task.task_id] == 0:
            yield f"task {task.task_id} is in no hTask: place it in one"
        if placed[task.task_id] > 1:
            yield f"task {task.task_id} is placed {placed[task.task_id]} times: place it in one hTask only"
    known = {t.task_id for t in plan.workload.tasks}
    for task_id in sorted(set(placed) - known):
        yield f"task {task_id} is placed but not in the workload"


def _instance(plan: Plan, instance: Instance) -> Iterator[str]:
    yield from _layout(plan, instance)
    in_buckets = Counter(h for b in instance.buckets for h in b.htasks)
    for h in range(len(instance.htasks)):
        if in_buckets[h] != 1:
            yield f"instance {instance.name}: hTask {h} is in {in_buckets[h]} buckets, must be in exactly 1"
    for h in sorted(set(in_buckets) - set(range(len(instance.htasks)))):
        yield f"instance {instance.name}: a bucket names hTask {h}, but there are only {len(instance.htasks)}"
    yield from _slots(plan, instance)
    yield from _chunks(plan, instance)
    yield from check_orders(instance)
    if all(0 <= x.stage < instance.layout.pp for b in instance.buckets for x in b.launches):
        yield from _launches(instance)
    else:
        yield f"instance {instance.name}: a launch list names a stage outside 0..{instance.layout.pp - 1}"


def _layout(plan: Plan, instance: Instance) -> Iterator[str]:
    name, layout, model = f"instance {instance.name}", instance.layout, plan.workload.model
    if len(instance.devices) != layout.ranks or len(set(instance.devices)) != layout.ranks:
        yield f"{name}: {list(instance.devices)} must be {layout.ranks} different devices (tp·pp·dp)"
    for device in instance.devices:
        if not 0 <= device < plan.cluster.size:
            yield f"{name}: device {device} is not in cluster {plan.cluster.name} of {plan.cluster.size}"
    if sum(layout.layers_per_stage) != model.layers:
        yield f"{name}: layers_per_stage sums to {sum(layout.layers_per_stage)}, model {model.name} has {model.layers} layers"
    for field in ("heads", "kv_heads", "ffn_hidden", "vocab"):
        if getattr(model, field) % layout.tp:
            yield f"{name}: tp={layout.tp} does not divide {field}={getattr(model, field)} of {model.name}"
    if instance.microbatches < 1:
        yield f"{name}: microbatches={instance.microbatches}: must be at least 1"


def _slots(plan: Plan, instance: Instance) -> Iterator[str]:
    """Every sample slot of every task is computed exactly once, in a bucket that holds its hTask."""
    used: Counter[tuple[str, int]] = Counter()
    known = {t.task_id: t.global_batch_samples for t in plan.workload.tasks}
    for b, bucket in enumerate(instance.buckets):
        for u, unit in enumerate(bucket.units):
            if not any(p.slots for p in unit.parts):
                yield f"instance {instance.name}: unit {u} of bucket {b} has no samples: leave it out"
            place = f"instance {instance.name}: unit {u} of bucket {b}"
            for part in unit.parts:
                used.update((part.task, s) for s in part.slots)
                if part.htask not in bucket.htasks or not 0 <= part.htask < len(instance.htasks):
                    yield f"{place} names hTask {part.htask}, which is not in that bucket"
                elif part.task not in instance.htasks[part.htask].tasks:
                    yield f"{place} runs task {part.task} in hTask {part.htask}, which does not hold it"
    for task in instance.tasks:
        slots = [used.pop((task, s), 0) for s in range(known.get(task, 0))]
        if any(n != 1 for n in slots):
            missing, twice = [s for s, n in enumerate(slots) if n == 0], [s for s, n in enumerate(slots) if n > 1]
            yield f"instance {instance.name}: task {task}: sample slots {missing} are in no unit and {twice} in several"
    for task, slot in sorted(used):
        yield f"instance {instance.name}: slot {slot} of task {task} is beyond its global batch or its instance"


def _chunks(plan: Plan, instance: Instance) -> Iterator[str]:
    """Each unit states the number of chunks that its packs have; parts that name nothing known are other checks' matter."""
    known = {t.task_id for t in plan.workload.tasks}
    if not known.issuperset(instance.tasks):
        return
    for b, bucket in enumerate(instance.buckets):
        for u, unit in enumerate(bucket.units):
            if all(0 <= p.htask < len(instance.htasks) and p.task in known for p in unit.parts):
                chunks = unit_chunks(plan.workload, instance.htasks, unit.parts)
                if unit.chunks != chunks:
                    yield (
                        f"instance {instance.name}: unit {u} of bucket {b} states {unit.chunks} chunks, "
                        f"its packs have {chunks}"
                    )


def _launches(instance: Instance) -> Iterator[str]:
    """Launch lists hold every subgraph of every hTask once, each hTask's own in serial order, collectives on comm."""
    for b, bucket in enumerate(instance.buckets):
        for h in bucket.htasks if bucket.adapter_fusion == "bucket" else ():
            if h < len(instance.htasks) and len(instance.htasks[h].tasks) > 1:
                yield (
                    f"instance {instance.name}: bucket {b} has adapter_fusion `bucket`, but hTask {h} holds "
                    f"{len(instance.htasks[h].tasks)} tasks: only hTasks of a single task share adapter launches; use `htask`"
                )
        for (stage, direction), count in Counter((x.stage, x.direction) for x in bucket.launches).items():
            if count > 1:
                yield (
                    f"instance {instance.name}: bucket {b} has {count} launch lists for stage {stage}, {direction}: "
                    "leave one"
                )
        for listing in bucket.launches:
            place = f"instance {instance.name}: launch list of bucket {b}, stage {listing.stage}, {listing.direction}"
            isolated = bucket.adapter_fusion == "bucket"
            subgraphs = launched_subgraphs(instance.layout, listing.stage, listing.direction, isolated)
            for h in bucket.htasks:
                mine = [x for x in listing.launches if x.htask == h]
                if [x.subgraph for x in mine] != [s.index for s in subgraphs]:
                    yield f"{place}: hTask {h} must launch subgraphs 0..{len(subgraphs) - 1} once each, in order"
                elif any((x.stream == "comm") != (subgraphs[x.subgraph].kind == "collective") for x in mine):
                    yield f"{place}: hTask {h}: collectives go on comm, all else on compute"
            if any(x.htask not in bucket.htasks for x in listing.launches):
                yield f"{place}: names an hTask outside the bucket"


def check_program(program: Program) -> tuple[str, ...]:
    """Channels of a Program: unique tags, matched ends, equal order on both ends of a channel, no cycle of waits."""
    problems: list[str] = []
    ends: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for listing in program.ranks:
        for index, x in enumerate(listing.instructions):
            if x.op in ("send", "recv"):
                assert x.tag is not None
                assert x.peer is not None
                ends.setdefault((x.op, x.tag), []).append((listing.rank, x.peer, index))
    for (op, tag), places in sorted(ends.items()):
        if len(places) > 1:
            problems.append(f"two {op}s carry tag {tag} (ranks {[p[0] for p in places]}): tags must be unique")
        other = ends.get(("recv" if op == "send" else "send", tag))
        if other is None:
            problems.append(f"the {op} with tag {tag} on rank {places[0][0]} has no counterpart")
        elif (other[0][0], other[0][1]) != (places[0][1], places[0][0]):
            problems.append(
                f"tag {tag}: rank {places[0][0]} {op}s with rank {places[0][1]}, the other end is rank {other[0][0]}"
            )
    if problems:
        return tuple(problems)
    return (*_channel_order(program), *_cycle(program))


def _channel_order(program: Program) -> Iterator[str]:
    """Channels are FIFO: the messages of one edge and payload must be sent and received in one order."""
    orders: dict[ChannelKey, dict[str, list[int]]] = {}
    for listing in program.ranks:
        for x in listing.instructions:
            if x.op in ("send", "recv"):
                channel = channel_of(listing.rank, x, program.at_once)
                orders.setdefault(channel, {"send": [], "recv": []})[x.op].append(x.tag or 0)
    for (source, target, payload, _), both in sorted(orders.items()):
        if both["send"] != both["recv"]:
            yield f"channel {source}→{target} ({payload}): messages are sent in another order than they are received"


def _cycle(program: Program) -> Iterator[str]:
    text = deadlock_text(program)
    if text:
        yield text


def check_memory(bound: Bound) -> tuple[str, ...]:
    """Ranks whose peak exceeds the device: the moment, the bytes needed and what they are made of, the bytes there."""
    return _short(bound, rank_peaks(bound))


def _short(bound: Bound, peaks: tuple[RankPeak, ...]) -> tuple[str, ...]:
    device = bound.plan.cluster.device
    return tuple(
        f"rank {peak.rank} does not fit: needs {format_bytes(peak.peak_bytes)} {moment_text(bound, peak)} "
        f"({format_bytes(peak.static_bytes)} of them static; {peak.footprint.sentence()}), "
        f"{device.name} has {format_bytes(device.memory_bytes)}"
        for peak in peaks
        if peak.peak_bytes > device.memory_bytes
    )
