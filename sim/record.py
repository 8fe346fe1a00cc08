"""From instruction times to a Timeline: spans of instructions and of the subgraphs inside them, memory and power samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise, repeat
from typing import Any

from muxtune.sim.at_once import in_time_order, power_of_lists, stretched, work_begins
from muxtune.sim.priced import PricedProgram, PricedRank, RunTimes
from muxtune.sim.stage import StageRun, Way
from muxtune.spec.isolated import launched_names
from muxtune.spec.memory import MemoryWalk
from muxtune.spec.noun import noun, nouns
from muxtune.spec.program import Bound, Instruction, RankProgram
from muxtune.spec.timeline import MemorySample, PowerSample, Span, Timeline, span_op
from muxtune.spec.units import NS_PER_S


@noun
class _Shape:
    """Columns that an instruction's spans share with those of an equal one: the instruction first, then its subgraphs.

    `starts_ns` and `ends_ns` count from the start of the clock.
    """

    stream: tuple[str, ...]
    op: tuple[str, ...]
    subgraph: tuple[int, ...]
    host_wait_ns: tuple[int, ...]
    htasks: tuple[tuple[int, ...], ...]
    starts_ns: tuple[int, ...]
    ends_ns: tuple[int, ...]


def outline(bound: Bound, priced: PricedProgram, times: RunTimes) -> Timeline:
    """The predicted Timeline of whole instructions, without the Program's digest."""
    program = bound.program
    spans = _spans(bound, priced, times, detailed=False)
    return Timeline(source="sim", program_digest="", seed=program.seed, steps=program.steps, spans=spans)


def record(bound: Bound, priced: PricedProgram, times: RunTimes) -> Timeline:
    """The predicted Timeline: instructions, the subgraphs inside them, memory, power, and the Program's digest."""
    program = bound.program
    rows = zip(program.ranks, priced.ranks, times, strict=True)
    shapes = memory_shapes(bound)
    samples = [memory_samples(bound, listing, costs.units, shapes, moments) for listing, costs, moments in rows]
    return Timeline(
        source="sim",
        program_digest=program.digest(),
        seed=program.seed,
        steps=program.steps,
        spans=_spans(bound, priced, times, detailed=True),
        memory=tuple(sample for rank in samples for sample in rank),
        power=power_samples(priced, times, bound.plan.cluster.device.idle_w),
        peak_bytes=tuple(max(s.in_use_bytes for s in rank) for rank in samples),
    )


def _spans(bound: Bound, priced: PricedProgram, times: RunTimes, *, detailed: bool) -> tuple[Span, ...]:
    recorder = _Recorder(bound, detailed)
    rows = zip(bound.program.ranks, priced.ranks, times, strict=True)
    return tuple(chain.from_iterable(recorder.rank_spans(*row) for row in rows))


class _Recorder:
    """Makes the spans of a rank in columns; what equal instructions share is put together once."""

    def __init__(self, bound: Bound, detailed: bool) -> None:
        self.plan, self.detailed = bound.plan, detailed
        found = [{b.htask: tuple(t for t, _, _ in b.segments()) for b in w.batches} for w in bound.program.units]
        self.htask_tasks = found
        self.unit_tasks = [tuple(t for tasks in each.values() for t in tasks) for each in found]
        numbers: dict[tuple[object, ...], int] = {}
        self.alike = [numbers.setdefault(tuple(each.items()), len(numbers)) for each in found]
        self.shapes: dict[tuple[object, ...], _Shape] = {}
        self.known_tasks: dict[tuple[int, int], list[tuple[str, ...]]] = {}

    def rank_spans(self, listing: RankProgram, costs: PricedRank, moments: Sequence[tuple[int, int]]) -> list[Span]:
        """Every span of a rank, each instruction's before those of its subgraphs."""
        shapes: list[_Shape] = []
        tasks: list[tuple[str, ...]] = []
        starts_ns: list[int] = []
        ends_ns: list[int] = []
        known: dict[int, _Shape] = {}
        rows = zip(listing.instructions, costs.instructions, costs.units, moments, strict=True)
        for x, cost, unit, (start_ns, end_ns) in rows:
            shape = known.get(id(cost))
            if shape is None:
                shape = known[id(cost)] = self._shape(listing.rank, x, cost.run if self.detailed else None)
            shapes.append(shape)
            tasks += [(x.task,)] if x.task is not None else self._tasks(shape, unit)
            starts_ns.append(start_ns)
            ends_ns.append(end_ns)
            if not shape.starts_ns:
                continue
            assert cost.run is not None
            # The instruction's own host work comes before its clock.
            base_ns = end_ns - cost.run.duration_ns
            if end_ns - start_ns == cost.duration_ns:
                starts_ns += [base_ns + ns for ns in shape.starts_ns]
                ends_ns += [base_ns + ns for ns in shape.ends_ns]
            else:
                first_ns, moment = cost.duration_ns - cost.run.duration_ns, (start_ns, end_ns)
                starts_ns += [stretched(first_ns + ns, cost, moment) for ns in shape.starts_ns]
                ends_ns += [stretched(first_ns + ns, cost, moment) for ns in shape.ends_ns]
        counts = [len(shape.subgraph) for shape in shapes]
        shared = {name: _joined(getattr(shape, name) for shape in shapes) for name in SHARED}
        own = {
            "index": _joined(map(repeat, range(len(counts)), counts)),
            "key": _joined(map(repeat, (x.key for x in listing.instructions), counts)),
            "tag": _joined(map(repeat, (x.tag for x in listing.instructions), counts)),
        }
        times = {"tasks": tasks, "start_ns": starts_ns, "end_ns": ends_ns}
        return nouns(Span, len(tasks), rank=listing.rank, **shared, **own, **times)

    def _tasks(self, shape: _Shape, unit: int) -> list[tuple[str, ...]]:
        """Tasks of an instruction's spans; units that hold the same tasks share them."""
        place = (id(shape), self.alike[unit])
        if place not in self.known_tasks:
            of = self.htask_tasks[unit]
            inner = [
                of[htasks[0]] if len(htasks) == 1 else tuple(t for h in htasks for t in of[h])
                for htasks in shape.htasks
            ]
            self.known_tasks[place] = [self.unit_tasks[unit], *inner]
        return self.known_tasks[place]

    def _shape(self, rank: int, x: Instruction, run: StageRun | None) -> _Shape:
        """Columns of an instruction; a stage run (which the caller keeps alive) has its own."""
        place = (x.op, x.payload) if run is None else (rank, x.key.instance, id(run))
        if place not in self.shapes:
            self.shapes[place] = self._first_shape(rank, x, run)
        return self.shapes[place]

    def _first_shape(self, rank: int, x: Instruction, run: StageRun | None) -> _Shape:
        stream, inner = "p2p" if x.op in ("send", "recv") else "compute", run.spans if run else ()
        instance = self.plan.instances[x.key.instance]
        way: Way = "forward" if x.op == "forward" else "backward"
        stage = instance.layout.stage_of(instance.devices.index(rank))
        isolated = bool(inner) and instance.buckets[x.key.bucket].adapter_fusion == "bucket"
        names = launched_names(instance.layout, stage, way, isolated) if inner else ()
        return _Shape(
            stream=(stream, *(s.stream for s in inner)),
            op=(span_op(x), *(names[s.subgraph] for s in inner)),
            subgraph=(-1, *(s.subgraph for s in inner)),
            host_wait_ns=(0, *(s.inner_ns for s in inner)),
            htasks=tuple((s.htask, *s.also) for s in inner),
            starts_ns=tuple(s.start_ns for s in inner),
            ends_ns=tuple(s.end_ns for s in inner),
        )


#: Fields of a span that are columns of `_Shape` as they are.
SHARED = ("stream", "op", "subgraph", "host_wait_ns")


def _joined(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def memory_samples(
    bound: Bound,
    listing: RankProgram,
    units: Sequence[int],
    shapes: Sequence[int],
    moments: Sequence[tuple[int, int]],
) -> list[MemorySample]:
    """Bytes in use on a rank from the start and the end of each instruction on.

    `units` has the place of each instruction's unit in the Program, `shapes` the number of every unit's shape there.
    """
    walk = MemoryWalk(bound, listing.rank)
    at_ns, in_use = [0], [walk.static_bytes]
    if len(listing.starts) > 1:
        for time_ns, index, begins in in_time_order(moments):
            (walk.begin if begins else walk.end)(listing.instructions[index])
            at_ns.append(time_ns)
            in_use.append(walk.in_use())
    else:
        now_bytes = walk.static_bytes
        for (during, after), moment in zip(_memory_changes(walk, listing, units, shapes), moments, strict=True):
            at_ns += moment
            in_use += (now_bytes + during, now_bytes := now_bytes + after)
    changes = [0, *(i + 1 for i, (before, after) in enumerate(pairwise(in_use)) if before != after)]
    return nouns(
        MemorySample,
        len(changes),
        rank=listing.rank,
        time_ns=[at_ns[i] for i in changes],
        in_use_bytes=[in_use[i] for i in changes],
    )


def memory_shapes(bound: Bound) -> list[int]:
    """For each unit of a Program a number; units of one number need the same bytes. Chunks hold each other's: none are alike."""
    works = bound.program.units
    if any(w.key.chunk for w in works):
        return list(range(len(works)))
    numbers: dict[object, int] = {}
    return [numbers.setdefault((w.key.instance, *(b.segments() for b in w.batches)), len(numbers)) for w in works]


def _memory_changes(
    walk: MemoryWalk, listing: RankProgram, units: Sequence[int], shapes: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """(bytes that an instruction adds while it runs, and for good), in order; one unit of each shape is walked for them."""
    walked: dict[int, int] = {}
    known: dict[object, tuple[int, int]] = {}
    kinds: list[object] = []
    for x, unit in zip(listing.instructions, units, strict=True):
        shape = shapes[unit] if unit >= 0 else -1
        kind = (x.op, x.payload, x.size_bytes, shape)
        kinds.append(kind)
        if unit >= 0 and walked.setdefault(shape, unit) == unit:
            before_bytes = walk.in_use()
            during_bytes, after_bytes = walk.step(x)
            known[kind] = (during_bytes - before_bytes, after_bytes - before_bytes)
    return (known.get(kind, (0, 0)) for kind in kinds)


def power_samples(priced: PricedProgram, times: RunTimes, idle_w: float) -> tuple[PowerSample, ...]:
    """Watts of every rank: idle, and each instruction's joules spread over its own time (waiting left out).

    Empty where the cost model has no energy figures.
    """
    if priced.costs.joules <= 0:
        return ()
    samples: list[PowerSample] = []
    begins_ns = work_begins(priced, times) if priced.beside else ()
    for place, (listing, moments) in enumerate(zip(priced.ranks, times, strict=True)):
        if len(listing.starts) > 1:
            for time_ns, watts in power_of_lists(listing, begins_ns[place], moments, idle_w):
                samples.append(PowerSample(rank=listing.rank, time_ns=time_ns, watts=watts))
            continue
        now = [(0, idle_w)]
        for cost, (_, end_ns) in zip(listing.instructions, moments, strict=True):
            if cost.joules and cost.duration_ns:
                watts = idle_w + cost.joules * NS_PER_S / cost.duration_ns
                now += [(end_ns - cost.duration_ns, watts), (end_ns, idle_w)]
        # Of several samples at one moment the last one holds.
        for time_ns, watts in dict(now).items():
            samples.append(PowerSample(rank=listing.rank, time_ns=time_ns, watts=watts))
    return tuple(samples)
