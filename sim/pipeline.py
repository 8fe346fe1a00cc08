"""Across clocks: one SimPy process per list of instructions interprets it, channels move messages (DESIGN §4)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

from muxtune.sim.des import Environment, Event
from muxtune.sim.priced import Channel, Priced, PricedProgram, PricedRank, RunTimes, deadlock

Work = TypeVar("Work")
Process = Generator[Any, Any, None]


def run_pipeline(priced: PricedProgram) -> tuple[RunTimes, int]:
    """(start and end of every instruction, simulated events).

    A message starts when it was sent, its channel is free and its receive is posted; the k-th receive of a channel is
    posted when the one before it has completed, the first at time 0. A step waits for every rank of its meeting.
    Instructions of lists that run at once on a device slow each other (sim/corun.py), as do messages of such lists on one
    edge, which share it evenly.

    Raises:
        PlanError: the instructions wait for each other in a cycle.
    """
    return _PipelineModel(priced).run()


class _PipelineModel:
    """One SimPy run of a Program; used once and thrown away."""

    def __init__(self, priced: PricedProgram) -> None:
        self.priced = priced
        self.env = Environment()
        self.channels = self._channels()
        self.met = [Event(self.env) for _ in priced.meetings]
        self.absent = list(priced.meetings)
        self.times: list[list[list[tuple[int, int]]]] = [[[] for _ in listing.starts] for listing in priced.ranks]

    def _channels(self) -> list[_ChannelModel]:
        """Channels of one edge share it."""
        edges: dict[tuple[int, int, str], _Shared[int]] = {}
        made: list[_ChannelModel] = []
        for c in self.priced.channels:
            edge = edges.setdefault((c.source, c.target, c.payload), _Shared(self.env, _evenly))
            made.append(_ChannelModel(self.env, len(made), c, edge if self.priced.beside else None))
        return made

    def run(self) -> tuple[RunTimes, int]:
        for listing, lists in zip(self.priced.ranks, self.times, strict=True):
            device = self._device(listing)
            for number, (places, times) in enumerate(zip(listing.lists, lists, strict=True)):
                mine = listing.instructions[places.start : places.stop]
                self.env.process(self._list(number, mine, times, device))
        self.env.drain()
        done = [[len(times) for times in lists] for lists in self.times]
        if done != [[len(places) for places in listing.lists] for listing in self.priced.ranks]:
            raise deadlock(self.priced, done)
        return tuple(tuple(pair for times in lists for pair in times) for lists in self.times), self.env.processed

    def _device(self, listing: PricedRank) -> _Shared[Priced] | None:
        """What a rank's lists share; None where it has one list."""
        beside = self.priced.beside
        if beside is None or len(listing.starts) == 1:
            return None

        def slowed_ns(x: Priced, others: Sequence[Priced]) -> int:
            loads = tuple(other.load for other in others if other.load)
            return beside.slowed(x.load, loads).duration_ns if x.load else x.duration_ns

        return _Shared(self.env, slowed_ns)

    def _list(
        self, number: int, mine: Sequence[Priced], times: list[tuple[int, int]], device: _Shared[Priced] | None
    ) -> Process:
        env, channels = self.env, self.channels
        for x in mine:
            start_ns = env.now
            if x.op == "recv":
                arrival = channels[x.channel].next_arrival()
                if arrival is not None:
                    yield arrival
            elif x.op == "step":
                yield self._meet(x)
            if x.duration_ns:
                if device and x.load:
                    yield from device.work(number, x, x.duration_ns)
                else:
                    yield env.timeout(x.duration_ns)
            if x.op == "send":
                channels[x.channel].send()
            elif x.op == "recv":
                channels[x.channel].post()
            times.append((start_ns, env.now))

    def _meet(self, x: Priced) -> Event:
        """The event that the last rank of a meeting triggers."""
        self.absent[x.meeting] -= 1
        if not self.absent[x.meeting]:
            self.met[x.meeting].succeed()
        return self.met[x.meeting]


class _Shared(Generic[Work]):
    """Something that several works use at once: each takes `slowed_ns(work, the others)` beside those all along.

    Whenever one begins or ends, what is left of every other, in its time alone, is rounded up to a whole nanosecond.
    """

    def __init__(self, env: Environment, slowed_ns: Callable[[Work, Sequence[Work]], int]) -> None:
        self.env, self.slowed_ns = env, slowed_ns
        self.running: dict[int, Work] = {}
        self.changed = Event(env)

    def work(self, mine: int, work: Work, alone_ns: int) -> Process:
        """Run one of them to its end; `mine` is a number that no other has meanwhile."""
        env = self.env
        self.running[mine] = work
        self._announce()
        left_ns = alone_ns
        while left_ns > 0:
            others = [self.running[number] for number in sorted(self.running) if number != mine]
            slowed_ns = self.slowed_ns(work, others)
            begin_ns = env.now
            yield env.timeout(-(-left_ns * slowed_ns // alone_ns)) | self.changed
            left_ns -= (env.now - begin_ns) * alone_ns // slowed_ns
        del self.running[mine]
        self._announce()

    def _announce(self) -> None:
        changed, self.changed = self.changed, Event(self.env)
        changed.succeed()


def _evenly(alone_ns: int, others: Sequence[int]) -> int:
    """Time of a message whose edge is shared with others."""
    return alone_ns * (1 + len(others))


class _ChannelModel:
    """Messages of one channel, in order: counts of those sent, posted and arrived; at most one is under way."""

    def __init__(self, env: Environment, number: int, channel: Channel, edge: _Shared[int] | None) -> None:
        self.env, self.number, self.transfers_ns, self.edge = env, number, channel.transfers_ns, edge
        self.sent = self.arrived = self.awaited = 0
        self.posted = 1
        self.moving = False
        self.arrival: Event | None = None

    def send(self) -> None:
        """The rank has handed over its next message."""
        self.sent += 1
        self._start()

    def post(self) -> None:
        """The receiver has completed a receive: the next one is posted."""
        self.posted += 1
        self._start()

    def next_arrival(self) -> Event | None:
        """The arrival that the receiver's next receive waits for; None if the message is there."""
        self.awaited += 1
        if self.arrived >= self.awaited:
            return None
        self.arrival = Event(self.env)
        return self.arrival

    def _start(self) -> None:
        """Begin to move the next message, if it is sent, its receive is posted and the channel is free."""
        if self.moving or self.arrived >= min(self.sent, self.posted):
            return
        self.moving = True
        if self.edge:
            self.env.process(self._move(self.edge))
        else:
            self.env.timeout(self.transfers_ns[self.arrived]).callbacks.append(self._arrive)

    def _move(self, edge: _Shared[int]) -> Process:
        transfer_ns = self.transfers_ns[self.arrived]
        yield from edge.work(self.number, transfer_ns, transfer_ns)
        self._arrive(None)

    def _arrive(self, _: Event | None) -> None:
        self.moving = False
        self.arrived += 1
        if self.arrival is not None and self.arrived == self.awaited:
            self.arrival.succeed()
            self.arrival = None
        self._start()
