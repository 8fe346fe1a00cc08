"""Across clocks: one SimPy process per rank interprets its instructions, one per channel moves messages (DESIGN §4)."""

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
        for channel in self.channels:
            self.env.process(channel.move())
        for listing, times in zip(self.priced.ranks, self.times, strict=True):
            self.env.process(self._rank(listing, times))
        self.env.run()
        done = [len(times) for times in self.times]
        if done != [len(x.instructions) for x in self.priced.ranks]:
            raise deadlock(self.priced, done)
        return tuple(tuple(times) for times in self.times), self.env.processed

    def _rank(self, listing: PricedRank, times: list[tuple[int, int]]) -> Generator[Any, Any, None]:
        for x in listing.instructions:
            start_ns = self.env.now
            if x.op == "recv":
                yield self.channels[x.channel].next_arrival()
            elif x.op == "step":
                yield self._meet(x)
            yield self.env.timeout(x.duration_ns)
            if x.op == "send":
                self.channels[x.channel].send()
            elif x.op == "recv":
                self.channels[x.channel].post()
            times.append((start_ns, self.env.now))

    def _meet(self, x: Priced) -> Event:
        """The event that the last rank of a meeting triggers."""
        self.absent[x.meeting] -= 1
        if not self.absent[x.meeting]:
            self.met[x.meeting].succeed()
        return self.met[x.meeting]


class _ChannelModel:
    """Messages of one channel, in order: each has an event for sent, receive posted, and arrived."""

    def __init__(self, env: Environment, channel: Channel) -> None:
        self.env, self.channel = env, channel
        count = len(channel.transfers_ns)
        self.sent = [Event(env) for _ in range(count)]
        self.posted = [Event(env) for _ in range(count + 1)]  # the last one is posted for a message that never comes
        self.arrived = [Event(env) for _ in range(count)]
        self.n_sent = self.n_awaited = self.n_posted = 0
        self.post()

    def send(self) -> None:
        """The rank has handed over its next message."""
        self.sent[self.n_sent].succeed()
        self.n_sent += 1

    def post(self) -> None:
        """The receiver has completed a receive (or begins): the next one is posted."""
        self.posted[self.n_posted].succeed()
        self.n_posted += 1

    def next_arrival(self) -> Event:
        """The arrival that the receiver's next receive waits for."""
        self.n_awaited += 1
        return self.arrived[self.n_awaited - 1]

    def move(self) -> Generator[Any, Any, None]:
        """Carry one message after the other."""
        for index, transfer_ns in enumerate(self.channel.transfers_ns):
            yield self.sent[index] & self.posted[index]
            yield self.env.timeout(transfer_ns)
            self.arrived[index].succeed()
