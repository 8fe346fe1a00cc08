"""Inside one pipeline clock of one stage: launches on compute stream, communication stream and host (DESIGN §4).

A kernel starts at max(issued by the host, its stream free in FIFO order, the hTask's previous subgraph done).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Literal

from muxtune.sim.cost.base import Cost, CostModel, CostSum
from muxtune.sim.des import Environment, Event, Store
from muxtune.sim.ledger import Ledger
from muxtune.spec.align import Batch
from muxtune.spec.catalogue import StageContext, subgraph_ops
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.noun import noun
from muxtune.spec.ops import COLLECTIVES, Op, host
from muxtune.spec.plan import Launch

Way = Literal["forward", "backward"]
StreamName = Literal["compute", "comm"]

#: Stage runs that are remembered; the oldest is dropped first.
CACHE_ENTRIES = 4096


@noun
class Block:
    """One launched subgraph as the streams see it.

    The host is taken for `host_ns` and has issued the first kernel after `first_ns`. Each kernel follows the one before
    it, not earlier than its own issue: with stream and dependency free at s and the host at h, the subgraph runs from
    max(s, h + first_ns) to max(s + device_ns, h + tail_ns). On a CPU all of it is device time (host ≡ compute).
    A launch without operators still takes its turn on the stream.
    `stream` is where it is shown, `resource` what it occupies.
    """

    htask: int
    subgraph: int
    stream: StreamName
    resource: StreamName
    first_ns: int
    host_ns: int
    device_ns: int
    tail_ns: int


@noun
class StageSpan:
    """When a subgraph ran, relative to the start of the clock; `stall_ns` of it were added by waiting for the host."""

    htask: int
    subgraph: int
    stream: StreamName
    start_ns: int
    end_ns: int
    stall_ns: int = 0


@noun
class StageRun:
    """One clock of one stage: its spans in launch order, and its costs summed.

    `host_bound_ns` is compute stream time lost by waiting for the host, `exposed_ns` communication under no compute,
    `events` the number of simulated events (0 from the closed form).
    """

    duration_ns: int
    spans: tuple[StageSpan, ...]
    costs: CostSum
    host_bound_ns: int
    exposed_ns: int
    events: int


@noun
class Site:
    """Where a stage runs: its operators' context, device, and the slowest link between its tp ranks (None for one)."""

    context: StageContext
    device: DeviceSpec
    link: Link | None = None


#: Blocks in launch order → (their spans in the same order, simulated events).
StageEngine = Callable[[Sequence[Block]], tuple[tuple[StageSpan, ...], int]]


def stage_run(
    cost: CostModel, site: Site, batches: Sequence[Batch], way: Way, launches: Sequence[Launch], engine: StageEngine
) -> StageRun:
    """Price the launches of the hTasks that have rows, and run them on the streams of one rank.

    Raises:
        ExtrapolationError: the cost model has no figure for an operator.
    """
    ledger = Ledger()
    groups = {b.htask: subgraph_ops(site.context, b, way) for b in batches}
    present = [x for x in launches if x.htask in groups]
    blocks = [_block(cost, site, way, x, groups[x.htask][x.subgraph], ledger) for x in present]
    spans, events = engine(blocks)
    return StageRun(
        duration_ns=max((s.end_ns for s in spans), default=0),
        spans=spans,
        costs=ledger.sum(),
        host_bound_ns=sum(s.stall_ns for s in spans if s.stream == "compute"),
        exposed_ns=_exposed_ns(spans),
        events=events,
    )


def _block(cost: CostModel, site: Site, way: Way, launch: Launch, ops: Iterable[Op], ledger: Ledger) -> Block:
    """Price one launch: the launch itself, then its operators issued one after the other."""
    start = cost.latency(host("launch", way), site.device)
    ledger.add("launch", start)
    prices: list[Cost] = []
    for op in ops:
        prices.append(_price(cost, site, op))
        ledger.add(op.family, prices[-1])
    shape = _on_cpu(start, prices) if site.device.is_cpu else _beside_host(start, prices)
    first_ns, host_ns, device_ns, tail_ns = shape
    return Block(
        htask=launch.htask,
        subgraph=launch.subgraph,
        stream=launch.stream,
        resource="compute" if site.device.is_cpu else launch.stream,
        first_ns=first_ns,
        host_ns=host_ns,
        device_ns=device_ns,
        tail_ns=tail_ns,
    )


def _on_cpu(start: Cost, prices: Sequence[Cost]) -> tuple[int, int, int, int]:
    """(first, host, device, tail) where the host is the device: all of it is device time."""
    # A measured remainder (ops.OVERHEADS) may be negative, a launch never is.
    device_ns = max(0, sum(price.p50_ns + price.host_ns for price in (start, *prices)))
    return 0, 0, device_ns, device_ns


def _beside_host(start: Cost, prices: Sequence[Cost]) -> tuple[int, int, int, int]:
    """(first, host, device, tail) where the host issues kernel after kernel while the device works."""
    launched_ns = issued_ns = tail_ns = start.p50_ns + start.host_ns
    for price in prices:
        issued_ns += price.host_ns
        tail_ns = max(tail_ns, issued_ns) + price.p50_ns
    first_ns = launched_ns + (prices[0].host_ns if prices else 0)
    return first_ns, issued_ns, sum(price.p50_ns for price in prices), tail_ns


def _price(cost: CostModel, site: Site, op: Op) -> Cost:
    if op.family not in COLLECTIVES:
        return cost.latency(op, site.device)
    assert site.link is not None, "a collective needs a link between tp ranks"
    return cost.link_latency(op, site.link)


def span_of(block: Block, host_ns: int, free_ns: int, ready_ns: int) -> StageSpan:
    """The span of a block that the host begins to launch at `host_ns`, its stream free and input ready as given."""
    device_free_ns = max(free_ns, ready_ns)
    end_ns = max(device_free_ns + block.device_ns, host_ns + block.tail_ns)
    return StageSpan(
        htask=block.htask,
        subgraph=block.subgraph,
        stream=block.stream,
        start_ns=max(device_free_ns, host_ns + block.first_ns),
        end_ns=end_ns,
        stall_ns=end_ns - device_free_ns - block.device_ns,
    )


def run_blocks(blocks: Sequence[Block]) -> tuple[tuple[StageSpan, ...], int]:
    """The SimPy engine: one host process issues launches in order, one process a stream runs them in FIFO order."""
    return _StageModel(blocks).run()


class _StageModel:
    """One SimPy run of a clock; used once and thrown away."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.env = Environment()
        self.blocks = blocks
        self.queues = {name: Store(self.env) for name in ("compute", "comm")}
        self.done = [Event(self.env) for _ in blocks]
        self.spans: dict[int, StageSpan] = {}
        self.previous = _previous(blocks)

    def run(self) -> tuple[tuple[StageSpan, ...], int]:
        self.env.process(self._host())
        for name, queue in self.queues.items():
            self.env.process(self._stream(queue, sum(b.resource == name for b in self.blocks)))
        self.env.run()
        return tuple(self.spans[i] for i in range(len(self.blocks))), self.env.processed

    def _host(self) -> Generator[Any, Any, None]:
        for index, block in enumerate(self.blocks):
            begin_ns = self.env.now
            yield self.env.timeout(block.first_ns)
            self.queues[block.resource].put((index, begin_ns))
            yield self.env.timeout(block.host_ns - block.first_ns)

    def _stream(self, queue: Store, count: int) -> Generator[Any, Any, None]:
        for _ in range(count):
            free_ns = self.env.now
            index, begin_ns = yield queue.get()
            previous = self.previous[index]
            ready_ns = 0
            if previous is not None:
                yield self.done[previous]
                ready_ns = self.spans[previous].end_ns
            span = self.spans[index] = span_of(self.blocks[index], begin_ns, free_ns, ready_ns)
            assert span.start_ns == self.env.now
            yield self.env.timeout(span.end_ns - span.start_ns)
            self.done[index].succeed()


def _previous(blocks: Sequence[Block]) -> list[int | None]:
    """For each block the place of the block of its hTask launched before it."""
    last: dict[int, int] = {}
    found: list[int | None] = []
    for index, block in enumerate(blocks):
        found.append(last.get(block.htask))
        last[block.htask] = index
    return found


def _exposed_ns(spans: Sequence[StageSpan]) -> int:
    """Communication time during which the compute stream idles. Spans of one stream never overlap."""
    compute = [s for s in spans if s.stream == "compute"]
    comm = [s for s in spans if s.stream == "comm"]
    exposed_ns = sum(s.end_ns - s.start_ns for s in comm)
    i = j = 0
    while i < len(comm) and j < len(compute):
        hidden_ns = min(comm[i].end_ns, compute[j].end_ns) - max(comm[i].start_ns, compute[j].start_ns)
        exposed_ns -= max(0, hidden_ns)
        if comm[i].end_ns <= compute[j].end_ns:
            i += 1
        else:
            j += 1
    return exposed_ns


class StageCache:
    """Remembers stage runs by everything that decides them: where, which way, the launch list, and the batches' shape.

    Tasks count by adapter and length, not by name, and inner stages of equal depth are one.
    """

    def __init__(self, cost: CostModel, engine: StageEngine = run_blocks) -> None:
        self.cost, self.engine = cost, engine
        self.events = 0
        self._runs: OrderedDict[tuple[Any, ...], StageRun] = OrderedDict()

    def run(self, site: Site, batches: Sequence[Batch], way: Way, launches: tuple[Launch, ...]) -> StageRun:
        """The run of these batches; simulated once."""
        shapes = tuple(batch_shape(site.context, b) for b in batches)
        key = (*_stage_shape(site.context), site.device, site.link, way, launches, shapes)
        if key not in self._runs:
            self._runs[key] = stage_run(self.cost, site, batches, way, launches, self.engine)
            self.events += self._runs[key].events
            if len(self._runs) > CACHE_ENTRIES:
                self._runs.popitem(last=False)
        return self._runs[key]


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
    return context.model, layout.tp, len(layout.layers_of(stage)), layout.is_first(stage), layout.is_last(stage)
