"""Closed form of both engines: end = max(what it depends on) + duration, without an event queue.

Equal to the SimPy engines to the nanosecond, which a test says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from muxtune.sim.priced import Priced, PricedProgram, RunTimes, deadlock
from muxtune.sim.streams import Block, StageSpan, Turn, previous_blocks, span_of, turn_of
from muxtune.spec.clock import slowed_end_ns


def recur_blocks(blocks: Sequence[Block]) -> tuple[tuple[StageSpan, ...], int]:
    """Spans of the launches of one clock, in launch order, and 0 events."""
    state = _StageRecurrence(blocks)
    for index, block in enumerate(blocks):
        if block.resource == "compute":
            state.collectives_that_can_start()
            state.compute(index)
    state.collectives_that_can_start()
    return tuple(state.spans[i] for i in range(len(blocks))), 0


class _StageRecurrence:
    """One clock: compute blocks in launch order, each after all collectives that could run beside it.

    A collective whose input is not there when a compute block starts waits for that block or a later one.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.previous = previous_blocks(blocks)
        self.begin_ns = list(accumulate((b.host_ns for b in blocks), initial=0))
        self.free_ns = {"compute": 0, "comm": 0}
        self.waiting = [i for i, b in enumerate(blocks) if b.resource == "comm"][::-1]
        self.collectives: list[tuple[int, int]] = []
        self.spans: dict[int, StageSpan] = {}

    def compute(self, index: int) -> None:
        """Run the next compute block."""
        turn = self._turn(index)
        end_ns = slowed_end_ns(turn.start_ns, turn.alone_ns, turn.shared_ns, self.collectives)
        self._close(index, turn, end_ns)

    def collectives_that_can_start(self) -> None:
        """Run collectives in order up to one whose input is missing."""
        while self.waiting and self._has_input(self.waiting[-1]):
            index = self.waiting.pop()
            turn = self._turn(index)
            self.collectives.append((turn.start_ns, turn.start_ns + turn.alone_ns))
            self._close(index, turn, self.collectives[-1][1])

    def _has_input(self, index: int) -> bool:
        return all(previous in self.spans for previous in self.previous[index])

    def _turn(self, index: int) -> Turn:
        block = self.blocks[index]
        ready_ns = max((self.spans[previous].end_ns for previous in self.previous[index]), default=0)
        return turn_of(block, self.begin_ns[index], self.free_ns[block.resource], ready_ns)

    def _close(self, index: int, turn: Turn, end_ns: int) -> None:
        self.free_ns[self.blocks[index].resource] = end_ns
        self.spans[index] = span_of(self.blocks[index], turn, end_ns)


def recur(priced: PricedProgram) -> RunTimes:
    """Start and end of every instruction. Lists that run at once slow each other: only the SimPy engine has those.

    Raises:
        PlanError: the instructions wait for each other in a cycle.
    """
    assert priced.beside is None
    state = _Recurrence(priced)
    while state.sweep():
        pass
    done = [len(times) for times in state.times]
    if done != [len(x.instructions) for x in priced.ranks]:
        raise deadlock(priced, [[count] for count in done])
    return tuple(tuple(times) for times in state.times)


class _Recurrence:
    """How far each rank is; every rank runs on until it needs something that another has not produced."""

    def __init__(self, priced: PricedProgram) -> None:
        self.priced = priced
        self.times: list[list[tuple[int, int]]] = [[] for _ in priced.ranks]
        self.now_ns = [0] * len(priced.ranks)
        self.sent_ns: list[list[int]] = [[] for _ in priced.channels]
        self.received = [0] * len(priced.channels)
        self.posted_ns = [0] * len(priced.channels)
        self.free_ns = [0] * len(priced.channels)
        self.reached_ns: list[dict[int, int]] = [{} for _ in priced.meetings]

    def sweep(self) -> bool:
        """Run every rank as far as it goes; whether any moved."""
        moved = [self._advance(rank) for rank in range(len(self.times))]
        return any(moved)

    def _advance(self, rank: int) -> bool:
        instructions, times = self.priced.ranks[rank].instructions, self.times[rank]
        before = len(times)
        while len(times) < len(instructions):
            x, start_ns = instructions[len(times)], self.now_ns[rank]
            ready_ns = self._ready_ns(rank, x, start_ns)
            if ready_ns is None:
                break
            end_ns = self.now_ns[rank] = ready_ns + x.duration_ns
            times.append((start_ns, end_ns))
            if x.op == "send":
                self.sent_ns[x.channel].append(end_ns)
            elif x.op == "recv":
                self.posted_ns[x.channel] = end_ns
        return len(times) > before

    def _ready_ns(self, rank: int, x: Priced, start_ns: int) -> int | None:
        """When an instruction reached at `start_ns` has all it waits for; None if that is not known yet."""
        if x.op == "recv":
            return self._arrival_ns(x.channel, start_ns)
        if x.op == "step":
            reached_ns = self.reached_ns[x.meeting]
            reached_ns[rank] = start_ns
            return max(reached_ns.values()) if len(reached_ns) == self.priced.meetings[x.meeting] else None
        return start_ns

    def _arrival_ns(self, channel: int, start_ns: int) -> int | None:
        """Arrival of the channel's next message: it starts when it is sent, the channel is free, its receive posted."""
        index = self.received[channel]
        if index == len(self.sent_ns[channel]):
            return None
        begin_ns = max(self.sent_ns[channel][index], self.posted_ns[channel], self.free_ns[channel])
        self.free_ns[channel] = begin_ns + self.priced.channels[channel].transfers_ns[index]
        self.received[channel] += 1
        return max(start_ns, self.free_ns[channel])
