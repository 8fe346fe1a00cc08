"""From instruction times to a Timeline: spans of instructions and of the subgraphs inside them, memory and power samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, repeat

from muxtune.sim.priced import PricedProgram, PricedRank, RunTimes
from muxtune.sim.stage import StageRun, Way
from muxtune.spec.catalogue import stage_subgraphs
from muxtune.spec.memory import MemoryWalk
from muxtune.spec.noun import nouns
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound, Instruction, RankProgram, UnitKey
from muxtune.spec.timeline import MemorySample, PowerSample, Span, Timeline, span_op
from muxtune.spec.units import NS_PER_S

#: What the spans of a clock have in common with those of an equal one: streams, operators, subgraphs and waits for the host,
#: the instruction itself first.
Names = tuple[list[str], list[str], list[int], list[int]]


def outline(bound: Bound, priced: PricedProgram, times: RunTimes) -> Timeline:
    """The predicted Timeline of whole instructions, without the Program's digest."""
    program = bound.program
    spans = _spans(bound, priced, times, detailed=False)
    return Timeline(source="sim", program_digest="", seed=program.seed, steps=program.steps, spans=spans)


def record(bound: Bound, priced: PricedProgram, times: RunTimes) -> Timeline:
    """The predicted Timeline: instructions, the subgraphs inside them, memory, power, and the Program's digest."""
    program = bound.program
    samples = [memory_samples(bound, place, times) for place in range(len(times))]
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
    for listing, costs, moments in zip(bound.program.ranks, priced.ranks, times, strict=True):
        recorder.add(listing, costs, moments)
    return recorder.spans()


class _Recorder:
    """Spans as columns, one a field: a clock adds all of its spans at once."""

    def __init__(self, bound: Bound, detailed: bool) -> None:
        self.detailed = detailed
        self.plan: Plan = bound.plan
        self.works = bound.program.units
        self.rank: list[int] = []
        self.stream: list[str] = []
        self.op: list[str] = []
        self.index: list[int] = []
        self.key: list[UnitKey] = []
        self.tasks: list[tuple[str, ...]] = []
        self.start_ns: list[int] = []
        self.end_ns: list[int] = []
        self.subgraph: list[int] = []
        self.tag: list[int | None] = []
        self.host_wait_ns: list[int] = []
        self.unit_tasks = [{b.htask: tuple(t for t, _, _ in b.segments()) for b in w.batches} for w in self.works]
        self.all_tasks = [tuple(t for tasks in found.values() for t in tasks) for found in self.unit_tasks]
        self.stages: dict[tuple[int, int], int] = {}
        self.names: dict[tuple[int, int, int], Names] = {}

    def spans(self) -> tuple[Span, ...]:
        """Every span, each instruction's before those of its subgraphs."""
        columns = {name: getattr(self, name) for name in Span.__dataclass_fields__}  # type: ignore[attr-defined]
        return tuple(nouns(Span, len(self.rank), **columns))

    def add(self, listing: RankProgram, costs: PricedRank, moments: Sequence[tuple[int, int]]) -> None:
        """The spans of one rank."""
        rows = zip(listing.instructions, costs.instructions, costs.units, moments, strict=True)
        for index, (x, cost, unit, (start_ns, end_ns)) in enumerate(rows):
            count = 1
            if self.detailed and cost.run is not None:
                count += len(cost.run.spans)
                self._clock(listing.rank, x, cost.run, unit, start_ns, end_ns)
            else:
                self.stream.append("p2p" if x.op in ("send", "recv") else "compute")
                self.op.append(span_op(x))
                self.tasks.append((x.task,) if x.task is not None else self.all_tasks[unit])
                self.subgraph.append(-1)
                self.host_wait_ns.append(0)
                self.start_ns.append(start_ns)
                self.end_ns.append(end_ns)
            self.rank += repeat(listing.rank, count)
            self.index += repeat(index, count)
            self.key += repeat(x.key, count)
            self.tag += repeat(x.tag, count)

    def _clock(self, rank: int, x: Instruction, run: StageRun, unit: int, start_ns: int, end_ns: int) -> None:
        """A forward or backward and its subgraphs; the instruction's own host work comes before them."""
        base_ns, tasks = end_ns - run.duration_ns, self.unit_tasks[unit]
        streams, ops, subgraphs, waits = self._names(rank, x, run)
        self.stream += streams
        self.op += ops
        self.subgraph += subgraphs
        self.host_wait_ns += waits
        self.tasks.append(self.all_tasks[unit])
        self.tasks += [tasks[s.htask] for s in run.spans]
        self.start_ns.append(start_ns)
        self.start_ns += [base_ns + s.start_ns for s in run.spans]
        self.end_ns.append(end_ns)
        self.end_ns += [base_ns + s.end_ns for s in run.spans]

    def _names(self, rank: int, x: Instruction, run: StageRun) -> Names:
        """Names of the spans of a stage run (which the caller keeps alive), the instruction's own first."""
        place = (rank, x.key.instance)
        if place not in self.stages:
            instance = self.plan.instances[x.key.instance]
            self.stages[place] = instance.layout.stage_of(instance.devices.index(rank))
        key = (x.key.instance, self.stages[place], id(run))
        if key not in self.names:
            way: Way = "forward" if x.op == "forward" else "backward"
            subgraphs = stage_subgraphs(self.plan.instances[x.key.instance].layout, self.stages[place], way)
            streams = ["compute", *(s.stream for s in run.spans)]
            ops = [span_op(x), *(subgraphs[s.subgraph].name for s in run.spans)]
            self.names[key] = (
                streams,
                ops,
                [-1, *(s.subgraph for s in run.spans)],
                [0, *(s.inner_ns for s in run.spans)],
            )
        return self.names[key]


def memory_samples(bound: Bound, place: int, times: RunTimes) -> list[MemorySample]:
    """Bytes in use on the rank at `place` in the Program, from the start and the end of each instruction on."""
    listing = bound.program.ranks[place]
    walk = MemoryWalk(bound, listing.rank)
    at_ns, in_use = [0], [walk.static_bytes]
    for x, moment in zip(listing.instructions, times[place], strict=True):
        at_ns += moment
        in_use += walk.step(x)
    changes = [0, *(i + 1 for i, (before, after) in enumerate(pairwise(in_use)) if before != after)]
    return nouns(
        MemorySample,
        len(changes),
        rank=listing.rank,
        time_ns=[at_ns[i] for i in changes],
        in_use_bytes=[in_use[i] for i in changes],
    )


def power_samples(priced: PricedProgram, times: RunTimes, idle_w: float) -> tuple[PowerSample, ...]:
    """Watts of every rank: idle, and each instruction's joules spread over its own time (waiting left out).

    Empty where the cost model has no energy figures.
    """
    if priced.costs.joules <= 0:
        return ()
    samples: list[PowerSample] = []
    for listing, moments in zip(priced.ranks, times, strict=True):
        now = [(0, idle_w)]
        for cost, (_, end_ns) in zip(listing.instructions, moments, strict=True):
            if cost.joules and cost.duration_ns:
                watts = idle_w + cost.joules * NS_PER_S / cost.duration_ns
                now += [(end_ns - cost.duration_ns, watts), (end_ns, idle_w)]
        # Of several samples at one moment the last one holds.
        for time_ns, watts in dict(now).items():
            samples.append(PowerSample(rank=listing.rank, time_ns=time_ns, watts=watts))
    return tuple(samples)
