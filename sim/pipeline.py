"""Across clocks: one SimPy process per rank interprets its instructions, channels move messages (DESIGN §4)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from muxtune.sim.des import Environment, Event
from muxtune.sim.priced import Channel, Priced, PricedProgram, PricedRank, RunTimes, deadlock


def run_pipeline(priced: PricedProgram) -> tuple[RunTimes, int]:
    """(start and end of every instruction, simulated events).

    A message starts when it was sent, its channel is free and its receive is posted; the k-th receive of a channel is
    posted when the one before it has completed, the first at time 0. A step waits for every rank of its meeting.

    Raises:
        PlanError: the instructions wait for each other in a cycle.
    """
    return _PipelineModel(priced).run()


class _PipelineModel:
    """One SimPy run of a Program; used once and thrown away."""

    def __init__(self, priced: PricedProgram) -> None:
        self.priced = priced
        self.env = Environment()
        self.channels = [_ChannelModel(self.env, c) for c in priced.channels]
        self.met = [Event(self.env) for _ in priced.meetings]
        self.absent = list(priced.meetings)
        self.times: list[list[tuple[int, int]]] = [[] for _ in priced.ranks]

    def run(self) -> tuple[RunTimes, int]:
        for listing, times in zip(self.priced.ranks, self.times, strict=True):
            self.env.process(self._rank(listing, times))
        self.env.drain()
        done = [len(times) for times in self.times]
        if done != [len(x.instructions) for x in self.priced.ranks]:
            raise deadlock(self.priced, done)
        return tuple(tuple(times) for times in self.times), self.env.processed

    def _rank(self, listing: PricedRank, times: list[tuple[int, int]]) -> Generator[Any, Any, None]:
        env, channels = self.env, self.channels
        for x in listing.instructions:
            start_ns = env.now
            if x.op == "recv":
                arrival = channels[x.channel].next_arrival()
                if arrival is not None:
                    yield arrival
            elif x.op == "step":
                yield self._meet(x)
            if x.duration_ns:
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


class _ChannelModel:
    """Messages of one channel, in order: counts of those sent, posted and arrived; at most one is under way."""

    def __init__(self, env: Environment, channel: Channel) -> None:
        self.env, self.transfers_ns = env, channel.transfers_ns
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
        self.env.timeout(self.transfers_ns[self.arrived]).callbacks.append(self._arrive)

    def _arrive(self, _: Event) -> None:
        self.moving = False
        self.arrived += 1
        if self.arrival is not None and self.arrived == self.awaited:
            self.arrival.succeed()
            self.arrival = None
        self._start()
