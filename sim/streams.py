"""The streams of one rank inside a clock: launches on compute stream, communication stream and host (DESIGN §4).

A kernel starts at max(issued by the host, its stream free in FIFO order, the hTask's previous subgraph done). While a
collective runs, compute beside it is slowed (spec/clock.py), the collective is not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

from muxtune.sim.des import Environment, Event, Store
from muxtune.spec.noun import noun

StreamName = Literal["compute", "comm"]


@noun
class Block:
    """One launched subgraph as the streams see it.

    The host is taken for `host_ns` and has issued the first kernel after `first_ns`. Each kernel follows the one before
    it, not earlier than its own issue: with stream and dependency free at s and the host at h, the subgraph runs from
    max(s, h + first_ns) to max(s + device_ns, h + tail_ns). On a CPU all of it is device time (host ≡ compute).
    A launch without operators still takes its turn on the stream. Where collectives run beside all of it, `shared_ns` and
    `shared_tail_ns` take the place of `device_ns` and `tail_ns`; below those they count as equal.
    `stream` is where it is shown, `resource` what it occupies. `also` are further hTasks whose adapters run in it: it waits
    for their subgraphs before, and theirs behind it for it.
    """

    htask: int
    subgraph: int
    stream: StreamName
    resource: StreamName
    first_ns: int
    host_ns: int
    device_ns: int
    tail_ns: int
    shared_ns: int = 0
    shared_tail_ns: int = 0
    also: tuple[int, ...] = ()


@noun
class Turn:
    """A block at the head of its stream: its start, and how long it takes alone and with collectives beside all of it."""

    start_ns: int
    alone_ns: int
    shared_ns: int
    stall_ns: int


@noun
class StageSpan:
    """When a subgraph ran, relative to the start of the clock.

    `stall_ns` were added by waiting for the host, of which `inner_ns` lie between its start and its end and the others before
    its start; `slowed_ns` of it were added by collectives beside it.
    """

    htask: int
    subgraph: int
    stream: StreamName
    start_ns: int
    end_ns: int
    stall_ns: int = 0
    slowed_ns: int = 0
    inner_ns: int = 0
    also: tuple[int, ...] = ()


#: Blocks in launch order → (their spans in the same order, simulated events).
StageEngine = Callable[[Sequence[Block]], tuple[tuple[StageSpan, ...], int]]


def turn_of(block: Block, host_ns: int, free_ns: int, ready_ns: int) -> Turn:
    """The turn of a block that the host begins to launch at `host_ns`, its stream free and input ready as given."""
    device_free_ns = max(free_ns, ready_ns)
    start_ns = max(device_free_ns, host_ns + block.first_ns)
    end_ns = max(device_free_ns + block.device_ns, host_ns + block.tail_ns)
    shared_end_ns = max(end_ns, device_free_ns + block.shared_ns, host_ns + block.shared_tail_ns)
    return Turn(
        start_ns=start_ns,
        alone_ns=end_ns - start_ns,
        shared_ns=shared_end_ns - start_ns,
        stall_ns=end_ns - device_free_ns - block.device_ns,
    )


def span_of(block: Block, turn: Turn, end_ns: int) -> StageSpan:
    """The span of a block that ended then."""
    return StageSpan(
        htask=block.htask,
        subgraph=block.subgraph,
        stream=block.stream,
        start_ns=turn.start_ns,
        end_ns=end_ns,
        stall_ns=turn.stall_ns,
        slowed_ns=end_ns - turn.start_ns - turn.alone_ns,
        inner_ns=turn.alone_ns - block.device_ns,
        also=block.also,
    )


def previous_blocks(blocks: Sequence[Block]) -> list[tuple[int, ...]]:
    """For each block the places of the blocks of its hTasks launched before it."""
    last: dict[int, int] = {}
    found: list[tuple[int, ...]] = []
    for index, block in enumerate(blocks):
        htasks = (block.htask, *block.also)
        found.append(tuple(last[h] for h in htasks if h in last))
        last.update(dict.fromkeys(htasks, index))
    return found


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
        self.previous = previous_blocks(blocks)
        self.collective = False
        self.changed = Event(self.env)

    def run(self) -> tuple[tuple[StageSpan, ...], int]:
        self.env.process(self._host())
        for name, queue in self.queues.items():
            self.env.process(self._stream(queue, sum(b.resource == name for b in self.blocks)))
        self.env.drain()
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
            ready_ns = 0
            for previous in self.previous[index]:
                yield self.done[previous]
                ready_ns = max(ready_ns, self.spans[previous].end_ns)
            turn = turn_of(self.blocks[index], begin_ns, free_ns, ready_ns)
            assert turn.start_ns == self.env.now
            yield from self._work(turn) if self.blocks[index].resource == "compute" else self._collective(turn)
            self.spans[index] = span_of(self.blocks[index], turn, self.env.now)
            self.done[index].succeed()

    def _collective(self, turn: Turn) -> Generator[Any, Any, None]:
        self._announce(True)
        yield self.env.timeout(turn.alone_ns)
        self._announce(False)

    def _announce(self, running: bool) -> None:
        self.collective = running
        changed, self.changed = self.changed, Event(self.env)
        changed.succeed()

    def _work(self, turn: Turn) -> Generator[Any, Any, None]:
        """Work off alone · shared units at the rate of the moment (spec/clock.py), until none is left."""
        if turn.shared_ns == turn.alone_ns:
            yield self.env.timeout(turn.alone_ns)
            return
        left = turn.alone_ns * turn.shared_ns
        while left > 0:
            rate = turn.alone_ns if self.collective else turn.shared_ns
            begin_ns = self.env.now
            yield self.env.timeout(-(-left // rate)) | self.changed
            left -= rate * (self.env.now - begin_ns)


def exposed_ns(spans: Sequence[StageSpan]) -> int:
    """Communication time during which the compute stream idles. Spans of one stream never overlap."""
    compute = [s for s in spans if s.stream == "compute"]
    comm = [s for s in spans if s.stream == "comm"]
    found_ns = sum(s.end_ns - s.start_ns for s in comm)
    i = j = 0
    while i < len(comm) and j < len(compute):
        hidden_ns = min(comm[i].end_ns, compute[j].end_ns) - max(comm[i].start_ns, compute[j].start_ns)
        found_ns -= max(0, hidden_ns)
        if comm[i].end_ns <= compute[j].end_ns:
            i += 1
        else:
            j += 1
    return found_ns
