"""Collectives of a clock, started asynchronously: gloo's worker threads on a CPU, a second stream on CUDA; and its clocks.

A collective that was started is settled (waited for, then used) right before the next subgraph of the same hTask.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.executor.peers import Peers
from muxtune.spec.catalogue import Collective

#: torch renamed both; the old names warn in new versions.
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A collective over tp along the tokens: what this rank gives, and who takes the result.

    all_reduce: (tokens, …) in place. reduce_scatter: (tokens, …), tokens a multiple of tp → a tp-th. all_gather: the way back.
    """

    kind: Collective
    tensor: Tensor
    finish: Callable[[Tensor], None]


class Jitter:
    """Random delays before and after everything that meets other ranks; `most_us` 0: none. To show that no wait is missing."""

    def __init__(self, seed: int = 0, most_us: int = 0) -> None:
        self.random, self.most_us = random.Random(seed), most_us

    def __call__(self) -> None:
        """Sleep for a random time."""
        if self.most_us:
            time.sleep(self.random.randrange(self.most_us) / 1e6)


#: A started collective, and what gives its result once that is done.
Started = tuple[Any, Callable[[], Tensor]]


def _start(exchange: Exchange, peers: Peers, gloo: bool) -> Started:
    given = exchange.tensor.contiguous()
    if exchange.kind == "all_gather":
        return _start_gather(given, peers)
    if exchange.kind == "all_reduce":
        return dist.all_reduce(given, group=peers.tp, async_op=True), lambda: given
    return _start_scatter(given, peers, gloo)


def _start_scatter(given: Tensor, peers: Peers, gloo: bool) -> Started:
    tp, tail = len(peers.order), given.shape[1:]
    if gloo:
        # gloo's own reduce_scatter is this all_reduce too, but its work cannot say when it was done.
        mine = peers.order[peers.tp.rank()]
        return dist.all_reduce(given, group=peers.tp, async_op=True), lambda: given.chunk(tp)[mine].clone()
    if peers.order != tuple(range(tp)):
        given = given.view(tp, -1, *tail)[list(peers.order)].view(-1, *tail)
    part = given.new_empty(given.size(0) // tp, *tail)
    return _scatter(part, given, group=peers.tp, async_op=True), lambda: part


def _start_gather(given: Tensor, peers: Peers) -> Started:
    tp, tail = len(peers.order), given.shape[1:]
    whole = given.new_empty(given.size(0) * tp, *tail)
    work = _gather(whole, given, group=peers.tp, async_op=True)
    if peers.order == tuple(range(tp)):
        return work, lambda: whole
    places = [peers.order.index(i) for i in range(tp)]
    return work, lambda: whole.view(tp, -1, *tail)[places].view(-1, *tail)


class Pending:
    """A collective on its way; `settle` waits and hands the result on. `span` is (start, end) as stamps of the rank's clock."""

    def __init__(self, wait: Callable[[], Any], use: Callable[[], None], start: Any, jitter: Jitter) -> None:
        self._wait, self._use, self._jitter = wait, use, jitter
        self.start, self.end = start, start

    def settle(self) -> None:
        """Wait until the collective is done and use its result."""
        self._jitter()
        self.end = self._wait()
        self._use()


class HostComm:
    """gloo: the work runs on gloo's threads, which note when it was done; stamps are nanoseconds of the monotonic clock."""

    def __init__(self, jitter: Jitter) -> None:
        self.jitter = jitter

    def stamp(self) -> int:
        """Now."""
        return time.perf_counter_ns()

    def begin(self) -> None:
        """Nothing to anchor: stamps are times."""

    def resolve(self, stamp: Any) -> int:
        """Nanoseconds of a stamp."""
        return int(stamp)

    def start(self, exchange: Exchange, peers: Peers) -> Pending:
        """Start a collective without waiting for it."""
        self.jitter()
        start_ns, done_ns = time.perf_counter_ns(), []
        work, result = _start(exchange, peers, gloo=True)
        work.get_future().add_done_callback(lambda _: done_ns.append(time.perf_counter_ns()))
        self.jitter()

        def wait() -> int:
            work.wait()
            # The note may come after the waiting thread was woken; then the collective has only just ended.
            return done_ns[0] if done_ns else time.perf_counter_ns()

        return Pending(wait, lambda: exchange.finish(result()), start_ns, self.jitter)


class StreamComm:
    """CUDA: collectives on a second stream that waits for the compute so far; stamps are events, read after the run.

    Every compute subgraph that uses a result makes the compute stream wait for the event behind it: the host never waits.
    """

    def __init__(self, jitter: Jitter, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.jitter, self.device, self.cuda = jitter, device, cuda
        self.side = cuda.Stream(device)
        self.anchor: tuple[Any, int] | None = None

    def begin(self) -> None:
        """Tie events to the machine's clock: a synchronised moment known in both."""
        self.cuda.synchronize(self.device)
        self.anchor = (self.stamp(), time.perf_counter_ns())

    def stamp(self) -> Any:
        """An event on the current stream."""
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def resolve(self, stamp: Any) -> int:
        """Nanoseconds of an event by the machine's clock; waits until it has happened."""
        assert self.anchor is not None
        stamp.synchronize()
        since_ms: float = self.anchor[0].elapsed_time(stamp)
        return self.anchor[1] + round(since_ms * 1e6)

    def start(self, exchange: Exchange, peers: Peers) -> Pending:
        """Start a collective on the second stream, after all compute that was launched before."""
        self.jitter()
        self.side.wait_stream(self.cuda.current_stream(self.device))
        with self.cuda.stream(self.side):
            begin = self.stamp()
            work, result = _start(exchange, peers, gloo=False)
            work.wait()  # the second stream waits, not the host
            end = self.stamp()
        exchange.tensor.record_stream(self.side)

        def wait() -> Any:
            self.cuda.current_stream(self.device).wait_event(end)
            return end

        def use() -> None:
            received = result()
            received.record_stream(self.cuda.current_stream(self.device))
            exchange.finish(received)

        return Pending(wait, use, begin, self.jitter)


Comm = HostComm | StreamComm


def own_device(kind: str, rank: int, cuda: Any = torch.cuda) -> torch.device:
    """The device of a rank: each rank of a node has a GPU of its own, and makes it the current one."""
    if kind == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", rank))
    cuda.set_device(index)
    return torch.device("cuda", index)


def make_comm(device: torch.device) -> Comm:
    """How collectives run on a device."""
    return StreamComm(Jitter(), device) if device.type == "cuda" else HostComm(Jitter())


def delay_collectives(worker: Any, name: str, seed: int, most_us: int) -> None:
    """Run in a worker: random delays in a loaded plan from now on, other ones on every rank."""
    for stage in worker.loaded[name].stages.values():
        stage.comm.jitter = Jitter(seed * 1000 + worker.hello.rank, most_us)
