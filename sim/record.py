"""From instruction times to a Timeline: spans of instructions and of the subgraphs inside them, memory and power samples."""

from __future__ import annotations

from collections.abc import Iterator

from muxtune.sim.priced import Priced, PricedProgram, RunTimes
from muxtune.sim.stage import Way
from muxtune.spec.catalogue import Subgraph, stage_subgraphs
from muxtune.spec.memory import MemoryWalk
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound, Instruction, UnitWork
from muxtune.spec.timeline import MemorySample, PowerSample, Span, Stream, Timeline, span_op
from muxtune.spec.units import NS_PER_S


def record(bound: Bound, priced: PricedProgram, times: RunTimes, *, detailed: bool) -> Timeline:
    """The predicted Timeline; `detailed` adds subgraph spans, memory, power and the Program's digest."""
    program = bound.program
    recorder = _Recorder(bound)
    spans: list[Span] = []
    for listing, costs, moments in zip(program.ranks, priced.ranks, times, strict=True):
        rows = zip(listing.instructions, costs.instructions, moments, strict=True)
        for index, (x, cost, (start_ns, end_ns)) in enumerate(rows):
            whole = recorder.instruction_span(listing.rank, index, x, start_ns, end_ns)
            spans.append(whole)
            if detailed:
                spans += recorder.subgraph_spans(whole, cost)
    samples = [memory_samples(bound, place, times) for place in range(len(times))] if detailed else []
    return Timeline(
        source="sim",
        program_digest=program.digest() if detailed else "",
        seed=program.seed,
        steps=program.steps,
        spans=tuple(spans),
        memory=tuple(sample for rank in samples for sample in rank),
        power=power_samples(priced, times, bound.plan.cluster.device.idle_w) if detailed else (),
        peak_bytes=tuple(max(s.in_use_bytes for s in rank) for rank in samples) if detailed else None,
    )


class _Recorder:
    """Names what runs: tasks of a unit and of each of its hTasks, and the subgraphs of a stage."""

    def __init__(self, bound: Bound) -> None:
        self.plan: Plan = bound.plan
        self.works: dict[object, UnitWork] = {w.key: w for w in bound.program.units}
        self.names: dict[tuple[int, int, str], tuple[Subgraph, ...]] = {}

    def instruction_span(self, rank: int, index: int, x: Instruction, start_ns: int, end_ns: int) -> Span:
        """The span of a whole instruction; a step carries its task, all else the tasks of its unit."""
        stream: Stream = "p2p" if x.op in ("send", "recv") else "compute"
        tasks = (x.task,) if x.task is not None else self.works[x.key].tasks
        return Span(
            rank=rank,
            stream=stream,
            op=span_op(x),
            index=index,
            key=x.key,
            tasks=tasks,
            start_ns=start_ns,
            end_ns=end_ns,
            tag=x.tag,
        )

    def subgraph_spans(self, whole: Span, cost: Priced) -> Iterator[Span]:
        """Spans of the subgraphs of a forward or backward; the instruction's own host work comes before them."""
        if cost.run is None:
            return
        base_ns = whole.end_ns - cost.run.duration_ns
        names = self._names(whole)
        tasks = {b.htask: tuple(task for task, _, _ in b.segments()) for b in self.works[whole.key].batches}
        for span in cost.run.spans:
            yield Span(
                rank=whole.rank,
                stream=span.stream,
                op=names[span.subgraph].name,
                index=whole.index,
                key=whole.key,
                tasks=tasks[span.htask],
                start_ns=base_ns + span.start_ns,
                end_ns=base_ns + span.end_ns,
                subgraph=span.subgraph,
                host_wait_ns=span.inner_ns,
            )

    def _names(self, whole: Span) -> tuple[Subgraph, ...]:
        instance = self.plan.instances[whole.key.instance]
        stage = instance.layout.stage_of(instance.devices.index(whole.rank))
        key = (whole.key.instance, stage, whole.op)
        if key not in self.names:
            way: Way = "forward" if whole.op == "forward" else "backward"
            self.names[key] = stage_subgraphs(instance.layout, stage, way)
        return self.names[key]


def memory_samples(bound: Bound, place: int, times: RunTimes) -> list[MemorySample]:
    """Bytes in use on the rank at `place` in the Program, from the start and the end of each instruction on."""
    listing = bound.program.ranks[place]
    walk = MemoryWalk(bound, listing.rank)
    samples = [MemorySample(rank=listing.rank, time_ns=0, in_use_bytes=walk.static_bytes)]
    for x, (start_ns, end_ns) in zip(listing.instructions, times[place], strict=True):
        during, after = walk.step(x)
        for time_ns, in_use_bytes in ((start_ns, during), (end_ns, after)):
            if in_use_bytes != samples[-1].in_use_bytes:
                samples.append(MemorySample(rank=listing.rank, time_ns=time_ns, in_use_bytes=in_use_bytes))
    return samples


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
