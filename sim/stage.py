"""Inside one pipeline clock of one stage: the launches of a bucket priced, run on the streams of one rank, and cached."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from muxtune.sim.cost.base import Cost, CostModel, CostSum, comm_load, leaders, priced_groups, prices
from muxtune.sim.ledger import Ledger
from muxtune.sim.streams import Block, StageEngine, StageSpan, exposed_ns, run_blocks
from muxtune.spec.align import Batch
from muxtune.spec.catalogue import StageContext
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.isolated import isolated_subgraphs, launched_together
from muxtune.spec.noun import noun
from muxtune.spec.ops import Op, host
from muxtune.spec.plan import COMM_CTAS, Launch

Way = Literal["forward", "backward"]

#: Stage runs that are remembered; the oldest is dropped first.
CACHE_ENTRIES = 4096


@noun
class StageRun:
    """One clock of one stage: its spans in launch order, and its costs summed.

    `host_bound_ns` is compute stream time lost by waiting for the host, `slowed_ns` by collectives beside compute (in `costs`
    it is the family `interference`), `exposed_ns` communication under no compute, `events` the number of simulated events (0
    from the closed form).
    """

    duration_ns: int
    spans: tuple[StageSpan, ...]
    costs: CostSum
    host_bound_ns: int
    exposed_ns: int
    events: int
    slowed_ns: int = 0

    @property
    def compute_ns(self) -> int:
        """Time in which the compute stream computes: its spans without their waits for the host."""
        return sum(s.end_ns - s.start_ns - s.inner_ns for s in self.spans if s.stream == "compute")


@noun
class Site:
    """Where a stage runs: its operators' context, device, and the slowest link between its tp ranks (None for one).

    `comm_ctas` are held by a running collective; the adapters of `unfused` hTasks run one after the other. `isolated`: the
    bucket's adapters are subgraphs of their own.
    """

    context: StageContext
    device: DeviceSpec
    link: Link | None = None
    comm_ctas: int = COMM_CTAS
    unfused: tuple[int, ...] = ()
    isolated: bool = False

    def together(self, launches: Sequence[Launch], way: Way) -> Iterator[tuple[Launch, ...]]:
        """The launches as they are run: neighbouring ones of the same adapters as one."""
        if not self.isolated:
            return ((launch,) for launch in launches)
        return launched_together(launches, isolated_subgraphs(self.context.layout, self.context.stage, way))

    @property
    def load(self) -> tuple[Op, ...]:
        """What runs beside compute while a collective runs."""
        return comm_load(self.device, self.link, self.comm_ctas)


def stage_run(
    cost: CostModel,
    site: Site,
    batches: Sequence[Batch],
    way: Way,
    launches: Sequence[Launch],
    engine: StageEngine,
    known: HTaskPrices | None = None,
) -> StageRun:
    """Price the launches of the hTasks that have rows, and run them on the streams of one rank.

    `known` remembers hTasks that were priced before with this cost model, in whatever company.

    Raises:
        ExtrapolationError: the cost model has no figure for an operator.
    """
    ledger = Ledger()
    # Collectives of an hTask never run beside its own compute.
    share = site.load if len(batches) > 1 else ()
    priced = HTaskPrices() if known is None else known
    kinds = {b.htask: priced.of(cost, site, b, way, share) for b in batches}
    there = [x for x in launches if x.htask in kinds]
    joint = _Joint(cost, site, way, share)
    launched = [(run, joint.of([kinds[x.htask][x.subgraph] for x in run])) for run in site.together(there, way)]
    for kind, times in Counter(kind for _, kind in launched).items():
        for family, price in kind.priced:
            ledger.add(family, price, times)
    spans, events = engine([kind.block(run, site.device.is_cpu) for run, kind in launched])
    for span, (_, kind) in zip(spans, launched, strict=True):
        if span.slowed_ns:
            ledger.add("interference", replace(kind.slowing, p50_ns=span.slowed_ns))
    return StageRun(
        duration_ns=max((s.end_ns for s in spans), default=0),
        spans=spans,
        costs=ledger.sum(),
        host_bound_ns=sum(s.stall_ns for s in spans if s.stream == "compute"),
        exposed_ns=exposed_ns(spans),
        events=events,
        slowed_ns=sum(s.slowed_ns for s in spans),
    )


def clock_calls(
    cost: CostModel, site: Site, batches: Sequence[Batch], way: Way, launches: Sequence[Launch]
) -> Iterator[tuple[Op, int]]:
    """(operator, device time alone) of every call of a clock in launch order; a group of adapters goes by its first."""
    groups = {b.htask: priced_groups(cost, site.context, b, way, site.isolated) for b in batches}
    for run in site.together([x for x in launches if x.htask in groups], way):
        ops = [op for x in run for op in groups[x.htask][x.subgraph]]
        fuse = len(run) > 1 or run[0].htask not in site.unfused
        priced = prices(cost, site.device, ops, link=site.link, fuse_adapters=fuse)
        yield from ((op, price.p50_ns) for op, (_, price) in zip(leaders(ops, fuse), priced, strict=True))


class _Kind:
    """What launches of the same operators cost alone and beside a collective, on their streams and in all."""

    __slots__ = ("device_ns", "first_ns", "host_ns", "ops", "priced", "shared_tail_ns", "slowing", "tail_ns")

    def __init__(
        self,
        ops: Sequence[Op],
        start: Cost,
        is_cpu: bool,
        priced: Sequence[tuple[str, Cost]],
        shared: Sequence[Cost] | None,
    ) -> None:
        self.ops = ops
        alone = [price for _, price in priced]
        beside = alone if shared is None else shared
        self.priced = (("launch", start), *priced)
        self.slowing = _slowing(alone, beside)
        if is_cpu:
            self.device_ns = self.tail_ns = self.shared_tail_ns = _on_cpu(start, alone)
            self.first_ns = self.host_ns = 0
        else:
            self.device_ns = sum(price.p50_ns for price in alone)
            self.first_ns, self.host_ns, self.tail_ns = _beside_host(start, alone)
            self.shared_tail_ns = _beside_host(start, beside)[2]

    def block(self, launches: Sequence[Launch], is_cpu: bool) -> Block:
        """One launch, or several of adapters that run as one: the launch itself, then its operators issued in turn."""
        launch, *more = launches
        return Block(
            htask=launch.htask,
            subgraph=launch.subgraph,
            stream=launch.stream,
            resource="compute" if is_cpu else launch.stream,
            first_ns=self.first_ns,
            host_ns=self.host_ns,
            device_ns=self.device_ns,
            tail_ns=self.tail_ns,
            shared_ns=self.device_ns + self.slowing.p50_ns,
            shared_tail_ns=self.shared_tail_ns,
            also=tuple(x.htask for x in more),
        )


class _Joint:
    """Prices adapters of several hTasks that run as one launch; used for one clock, each set of kinds once."""

    def __init__(self, cost: CostModel, site: Site, way: Way, share: tuple[Op, ...]) -> None:
        self.cost, self.site, self.way, self.share = cost, site, way, share
        self.known: dict[tuple[int, ...], _Kind] = {}

    def of(self, kinds: Sequence[_Kind]) -> _Kind:
        """The one kind itself, or the adapters of all as one grouped operator."""
        if len(kinds) == 1:
            return kinds[0]
        place = tuple(map(id, kinds))
        if place not in self.known:
            ops = [op for kind in kinds for op in kind.ops]
            self.known[place] = _priced_kind(self.cost, self.site, self.way, self.share, True, ops)
        return self.known[place]


class HTaskPrices:
    """Prices of hTasks on a stage, subgraph by subgraph, by everything that decides them: equal ones in any clock share them.

    The oldest is dropped first.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], tuple[_Kind, ...]] = OrderedDict()

    def of(self, cost: CostModel, site: Site, batch: Batch, way: Way, share: tuple[Op, ...]) -> tuple[_Kind, ...]:
        """The subgraphs of a batch, priced once."""
        fuse = batch.htask not in site.unfused
        shape = batch_shape(site.context, batch)[1]
        key = (*_stage_shape(site.context), site.device, site.link, share, fuse, site.isolated, way, shape)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _kinds(cost, site, batch, way, share, fuse)
            if len(self._known) > CACHE_ENTRIES:
                self._known.popitem(last=False)
        return found


def _kinds(cost: CostModel, site: Site, batch: Batch, way: Way, share: tuple[Op, ...], fuse: bool) -> tuple[_Kind, ...]:
    """Each subgraph; those of the same operators (equal layers share theirs) are priced once."""
    found: dict[tuple[int, ...], _Kind] = {}
    groups = priced_groups(cost, site.context, batch, way, site.isolated)
    known = {at: tuple(map(id, ops)) for at, ops in {id(g): g for g in groups}.items()}
    places = [known[id(ops)] for ops in groups]
    for place, ops in zip(places, groups, strict=True):
        if place not in found:
            found[place] = _priced_kind(cost, site, way, share, fuse, ops)
    return tuple(found[place] for place in places)


def _priced_kind(cost: CostModel, site: Site, way: Way, share: tuple[Op, ...], fuse: bool, ops: Sequence[Op]) -> _Kind:
    def priced(beside: tuple[Op, ...]) -> list[tuple[str, Cost]]:
        return list(prices(cost, site.device, ops, link=site.link, share=beside, fuse_adapters=fuse))

    shared = [c for _, c in priced(share)] if share else None
    start = cost.latency(host("launch", way), site.device)
    return _Kind(ops, start, site.device.is_cpu, priced(()), shared)


def _slowing(alone: Sequence[Cost], shared: Sequence[Cost]) -> Cost:
    """What collectives beside all of a block add, and how far to trust that."""
    rows = [(max(0, s.p50_ns - a.p50_ns), s) for a, s in zip(alone, shared, strict=True)]
    added_ns = sum(ns for ns, _ in rows)
    return Cost(
        p50_ns=added_ns,
        relative_error=sum(ns * s.relative_error for ns, s in rows) / added_ns if added_ns else 0.0,
        extrapolated=any(s.extrapolated for ns, s in rows if ns),
    )


def _on_cpu(start: Cost, prices: Sequence[Cost]) -> int:
    """Device time where the host is the device: all of it."""
    # A measured remainder (ops.OVERHEADS) may be negative, a launch never is.
    return max(0, sum(price.p50_ns + price.host_ns for price in (start, *prices)))


def _beside_host(start: Cost, prices: Sequence[Cost]) -> tuple[int, int, int]:
    """(first, host, tail) where the host issues kernel after kernel while the device works."""
    launched_ns = issued_ns = tail_ns = start.p50_ns + start.host_ns
    for price in prices:
        issued_ns += price.host_ns
        tail_ns = max(tail_ns, issued_ns) + price.p50_ns
    return launched_ns + (prices[0].host_ns if prices else 0), issued_ns, tail_ns


class StageCache:
    """Remembers stage runs by everything that decides them: where, which way, the launch list, and the batches' shape.

    Tasks count by adapter and length, not by name, and inner stages of equal depth are one.
    """

    def __init__(self, cost: CostModel, engine: StageEngine = run_blocks) -> None:
        self.cost, self.engine = cost, engine
        self.simulated = 0
        self._runs: OrderedDict[tuple[Any, ...], StageRun] = OrderedDict()
        self._htasks = HTaskPrices()

    def run(self, site: Site, batches: Sequence[Batch], way: Way, launches: tuple[Launch, ...]) -> StageRun:
        """The run of these batches; simulated once."""
        shapes = tuple(batch_shape(site.context, b) for b in batches)
        key = (
            *_stage_shape(site.context),
            site.device,
            site.link,
            site.comm_ctas,
            site.unfused,
            site.isolated,
            way,
            launches,
            shapes,
        )
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = stage_run(self.cost, site, batches, way, launches, self.engine, self._htasks)
            self.simulated += 1
            if len(self._runs) > CACHE_ENTRIES:
                self._runs.popitem(last=False)
        return found


def batch_shape(context: StageContext, batch: Batch) -> tuple[Any, ...]:
    """What a batch's operators depend on: for each task segment its adapter and the lengths of its rows (own, past, padding)."""
    rows: list[tuple[str, list[tuple[int, int, int]]]] = []
    for row in batch.rows:
        if not rows or rows[-1][0] != row.task:
            rows.append((row.task, []))
        rows[-1][1].append((row.length_tokens, row.past_tokens, row.padding_tokens))
    return batch.htask, tuple((context.peft(task), tuple(lengths)) for task, lengths in rows)


def _stage_shape(context: StageContext) -> tuple[Any, ...]:
    layout, stage = context.layout, context.stage
    ends = (layout.is_first(stage), layout.is_last(stage))
    return context.model, layout.tp, layout.sequence_parallel, layout.recompute, len(layout.layers_of(stage)), *ends
