"""Orders across clocks and inside a clock: pure functions of counts, or of latencies that the caller passes in."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType

from muxtune.spec.noun import noun
from muxtune.spec.plan import Action, Bucket, Instance, OrderKey, StageOrder

#: (bucket, unit, chunk).
ChunkKey = tuple[int, int, int]
#: (bucket, unit) → K, the chunks that the unit is cut into; 1 where it is missing.
ChunksOf = Mapping[OrderKey, int]
NO_CHUNKS: ChunksOf = MappingProxyType({})


def feed_of(instance: Instance) -> tuple[OrderKey, ...]:
    """The order in which units enter the pipeline: the plan's feed, or bucket after bucket."""
    return instance.feed or bucket_major(instance.buckets)


def bucket_major(buckets: Sequence[Bucket]) -> tuple[OrderKey, ...]:
    """Units of a bucket stay consecutive (MuxTune §3.4.1, rule 2)."""
    return tuple((b, u) for b, bucket in enumerate(buckets) for u in range(len(bucket.units)))


def round_robin(buckets: Sequence[Bucket]) -> tuple[OrderKey, ...]:
    """Unit 0 of every bucket, then unit 1 of every bucket, and so on (interleaved micro-batches)."""
    longest = max(len(b.units) for b in buckets)
    return tuple((b, u) for u in range(longest) for b, bucket in enumerate(buckets) if u < len(bucket.units))


def chunks_of(instance: Instance) -> ChunksOf:
    """K of every unit of an instance."""
    return {(b, u): unit.chunks for b, bucket in enumerate(instance.buckets) for u, unit in enumerate(bucket.units)}


def forward_keys(feed: Sequence[OrderKey], chunks: ChunksOf) -> tuple[ChunkKey, ...]:
    """Forwards in feed order; chunk j needs the KV of the chunks before it."""
    return tuple((*key, j) for key in feed for j in range(chunks.get(key, 1)))


def backward_keys(feed: Sequence[OrderKey], chunks: ChunksOf) -> tuple[ChunkKey, ...]:
    """Backwards: the last chunk of the oldest pack first; chunk j needs the dKV that chunk j+1 leaves."""
    return tuple((*key, j) for key in feed for j in reversed(range(chunks.get(key, 1))))


def one_f_one_b(
    feed: Sequence[OrderKey], stages: int, step: int = 0, chunks: ChunksOf = NO_CHUNKS
) -> tuple[StageOrder, ...]:
    """1F1B: stage s runs S−s−1 + K−1 forwards to warm up, then one forward and one backward in turn, then drains.

    K is the number of chunks of the oldest unit in flight (1 where it is not cut), which has all of them in flight before
    its first backward. Units of U equal chunks take exactly 2(S−1)t + 2Ut.
    """
    forwards, backwards = forward_keys(feed, chunks), backward_keys(feed, chunks)
    needed = _forwards_needed([chunks.get(key, 1) for key in feed])
    orders: list[StageOrder] = []
    for stage in range(stages):
        actions: list[Action] = []
        done = 0
        for key, before in zip(backwards, needed, strict=True):
            until = before + stages - stage - 1
            actions += [_forward(k, step) for k in forwards[done:until]]
            actions.append(_backward(key, step))
            done = until
        orders.append(StageOrder(stage=stage, actions=tuple(actions)))
    return tuple(orders)


def _forwards_needed(counts: Sequence[int]) -> list[int]:
    """Forwards that the last stage runs before each backward: the whole oldest unit, then one of the next in turn."""
    needed: list[int] = []
    end = 0
    for count, following in zip_longest(counts, counts[1:], fillvalue=0):
        end += count
        needed += [end + min(turn, following) for turn in range(count)]
    return needed


def gpipe(feed: Sequence[OrderKey], stages: int, step: int = 0, chunks: ChunksOf = NO_CHUNKS) -> tuple[StageOrder, ...]:
    """GPipe: all forwards, then all backwards in the same order of units, a unit's last chunk first."""
    actions = tuple(_forward(k, step) for k in forward_keys(feed, chunks))
    actions += tuple(_backward(k, step) for k in backward_keys(feed, chunks))
    return tuple(StageOrder(stage=s, actions=actions) for s in range(stages))


def _forward(key: ChunkKey, step: int) -> Action:
    return Action(op="forward", bucket=key[0], unit=key[1], chunk=key[2], step=step)


def _backward(key: ChunkKey, step: int) -> Action:
    return Action(op="backward", bucket=key[0], unit=key[1], chunk=key[2], step=step)


@noun
class Template:
    """An eager order and the time it takes with the latencies it was made from (communication left out)."""

    orders: tuple[StageOrder, ...]
    makespan_ns: int


#: (stage, chunk of a unit, direction) → ns, and (stage, chunk) → bytes held from its forward to the unit's last backward.
LatencyOf = Callable[[int, ChunkKey, str], int]
BytesOf = Callable[[int, ChunkKey], int]


def eager(
    feed: Sequence[OrderKey],
    stages: int,
    latency_ns: LatencyOf,
    held_bytes: BytesOf,
    budget_bytes: Sequence[int],
    chunks: ChunksOf = NO_CHUNKS,
) -> Template:
    """The paper's template order (§3.4.1): a work-conserving, backward-first list schedule under each stage's byte budget.

    Forwards start in feed order as long as the stage's in-flight units stay within `budget_bytes[stage]`; the oldest unit
    in flight is always admitted with all its chunks, so the schedule ends. Backwards take the last chunk of the oldest
    unit; a unit's chunks are held until its last backward. Ties are broken by (time, stage), never by chance.
    """
    schedule = _EagerSchedule(tuple(feed), stages, latency_ns, held_bytes, tuple(budget_bytes), chunks)
    return schedule.run()


class _EagerSchedule:
    """State of one list-schedule run; used once and thrown away."""

    def __init__(
        self,
        feed: tuple[OrderKey, ...],
        stages: int,
        latency_ns: LatencyOf,
        held_bytes: BytesOf,
        budget_bytes: tuple[int, ...],
        chunks: ChunksOf,
    ) -> None:
        self.stages, self.latency_ns, self.held_bytes, self.budget = stages, latency_ns, held_bytes, budget_bytes
        self.chunks = {key: chunks.get(key, 1) for key in feed}
        self.forwards, self.backwards = forward_keys(feed, chunks), backward_keys(feed, chunks)
        self.place = {key: index for index, key in enumerate(self.backwards)}
        self.actions: list[list[Action]] = [[] for _ in range(stages)]
        self.next_forward = [0] * stages
        self.arrived = [len(self.forwards)] + [0] * (stages - 1)
        self.backward_ready: list[list[int]] = [[] for _ in range(stages)]
        self.held = [0] * stages
        self.in_flight: list[deque[OrderKey]] = [deque() for _ in range(stages)]
        self.busy = [False] * stages
        self.events: list[tuple[int, int, str, int]] = []
        self.now_ns = 0

    def run(self) -> Template:
        self._start_all()
        while self.events:
            self.now_ns, stage, direction, index = heapq.heappop(self.events)
            self._finish(stage, direction, index)
            while self.events and self.events[0][0] == self.now_ns:
                _, stage, direction, index = heapq.heappop(self.events)
                self._finish(stage, direction, index)
            self._start_all()
        orders = tuple(StageOrder(stage=s, actions=tuple(a)) for s, a in enumerate(self.actions))
        return Template(orders=orders, makespan_ns=self.now_ns)

    def _finish(self, stage: int, direction: str, index: int) -> None:
        self.busy[stage] = False
        last_stage = stage + 1 == self.stages
        if direction == "forward":
            bucket, unit, chunk = key = self.forwards[index]
            if not last_stage:
                self.arrived[stage + 1] += 1
            elif chunk + 1 == self.chunks[bucket, unit]:
                self._ready(stage, key)
            return
        bucket, unit, chunk = key = self.backwards[index]
        if chunk == 0:
            self.in_flight[stage].popleft()
            pack = ((bucket, unit, j) for j in range(self.chunks[bucket, unit]))
            self.held[stage] -= sum(self.held_bytes(stage, k) for k in pack)
        elif last_stage:
            self._ready(stage, (bucket, unit, chunk - 1))
        if stage > 0:
            # The stage below got chunk + 1 before, and runs it before: its own dKV needs no other bookkeeping.
            self._ready(stage - 1, key)

    def _ready(self, stage: int, key: ChunkKey) -> None:
        heapq.heappush(self.backward_ready[stage], self.place[key])

    def _start_all(self) -> None:
        for stage in range(self.stages):
            if self.busy[stage]:
                continue
            if self.backward_ready[stage]:
                index = heapq.heappop(self.backward_ready[stage])
                self.actions[stage].append(_backward(self.backwards[index], 0))
                self._start(stage, "backward", index, self.backwards[index])
            elif self._may_forward(stage):
                self._start_forward(stage)

    def _may_forward(self, stage: int) -> bool:
        index = self.next_forward[stage]
        if index >= self.arrived[stage] or index >= len(self.forwards):
            return False
        key, in_flight = self.forwards[index], self.in_flight[stage]
        needed = self.held[stage] + self.held_bytes(stage, key)
        return not in_flight or in_flight[0] == key[:2] or needed <= self.budget[stage]

    def _start_forward(self, stage: int) -> None:
        index = self.next_forward[stage]
        key = self.forwards[index]
        self.next_forward[stage] += 1
        self.held[stage] += self.held_bytes(stage, key)
        if key[2] == 0:
            self.in_flight[stage].append(key[:2])
        self.actions[stage].append(_forward(key, 0))
        self._start(stage, "forward", index, key)

    def _start(self, stage: int, direction: str, index: int, key: ChunkKey) -> None:
        self.busy[stage] = True
        heapq.heappush(self.events, (self.now_ns + self.latency_ns(stage, key, direction), stage, direction, index))
