"""Orders across clocks and inside a clock: pure functions of counts, or of latencies that the caller passes in."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from muxtune.spec.noun import noun
from muxtune.spec.plan import Action, Bucket, Instance, OrderKey, StageOrder


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


def one_f_one_b(feed: Sequence[OrderKey], stages: int, step: int = 0) -> tuple[StageOrder, ...]:
    """1F1B: stage s runs S−s−1 forwards to warm up, then one forward and one backward in turn, then drains."""
    orders: list[StageOrder] = []
    for stage in range(stages):
        warmup = min(stages - stage - 1, len(feed))
        actions = [_forward(k, step) for k in feed[:warmup]]
        for done, key in enumerate(feed[warmup:]):
            actions += [_forward(key, step), _backward(feed[done], step)]
        actions += [_backward(k, step) for k in feed[len(feed) - warmup :]]
        orders.append(StageOrder(stage=stage, actions=tuple(actions)))
    return tuple(orders)


def gpipe(feed: Sequence[OrderKey], stages: int, step: int = 0) -> tuple[StageOrder, ...]:
    """GPipe: all forwards, then all backwards in the same order."""
    actions = tuple(_forward(k, step) for k in feed) + tuple(_backward(k, step) for k in feed)
    return tuple(StageOrder(stage=s, actions=actions) for s in range(stages))


def _forward(key: OrderKey, step: int) -> Action:
    return Action(op="forward", bucket=key[0], unit=key[1], step=step)


def _backward(key: OrderKey, step: int) -> Action:
    return Action(op="backward", bucket=key[0], unit=key[1], step=step)


@noun
class Template:
    """An eager order and the time it takes with the latencies it was made from (communication left out)."""

    orders: tuple[StageOrder, ...]
    makespan_ns: int


#: (stage, unit, direction) → ns, and (stage, unit) → bytes held from forward to backward.
LatencyOf = Callable[[int, OrderKey, str], int]
BytesOf = Callable[[int, OrderKey], int]


def eager(
    feed: Sequence[OrderKey], stages: int, latency_ns: LatencyOf, held_bytes: BytesOf, budget_bytes: Sequence[int]
) -> Template:
    """The paper's template order (§3.4.1): a work-conserving, backward-first list schedule under each stage's byte budget.

    Forwards start in feed order as long as the stage's in-flight units stay within `budget_bytes[stage]`, (one unit is always
    admitted, so the schedule ends). Ties are broken by (time, stage), never by chance.
    """
    schedule = _EagerSchedule(tuple(feed), stages, latency_ns, held_bytes, tuple(budget_bytes))
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
    ) -> None:
        self.feed, self.stages, self.latency_ns, self.held_bytes, self.budget = (
            feed,
            stages,
            latency_ns,
            held_bytes,
            budget_bytes,
        )
        self.actions: list[list[Action]] = [[] for _ in range(stages)]
        self.next_forward = [0] * stages
        self.arrived = [len(feed)] + [0] * (stages - 1)
        self.backward_ready: list[list[int]] = [[] for _ in range(stages)]
        self.held = [0] * stages
        self.in_flight = [0] * stages
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
        if direction == "forward":
            if stage + 1 < self.stages:
                self.arrived[stage + 1] += 1
            else:
                heapq.heappush(self.backward_ready[stage], index)
            return
        self.held[stage] -= self.held_bytes(stage, self.feed[index])
        self.in_flight[stage] -= 1
        if stage > 0:
            heapq.heappush(self.backward_ready[stage - 1], index)

    def _start_all(self) -> None:
        for stage in range(self.stages):
            if self.busy[stage]:
                continue
            if self.backward_ready[stage]:
                self._start(stage, "backward", heapq.heappop(self.backward_ready[stage]))
            elif self._may_forward(stage):
                self._start(stage, "forward", self.next_forward[stage])
                self.next_forward[stage] += 1

    def _may_forward(self, stage: int) -> bool:
        index = self.next_forward[stage]
        if index >= self.arrived[stage] or index >= len(self.feed):
            return False
        needed = self.held[stage] + self.held_bytes(stage, self.feed[index])
        return self.in_flight[stage] == 0 or needed <= self.budget[stage]

    def _start(self, stage: int, direction: str, index: int) -> None:
        key = self.feed[index]
        if direction == "forward":
            self.held[stage] += self.held_bytes(stage, key)
            self.in_flight[stage] += 1
            self.actions[stage].append(_forward(key, 0))
        else:
            self.actions[stage].append(_backward(key, 0))
        self.busy[stage] = True
        heapq.heappush(self.events, (self.now_ns + self.latency_ns(stage, key, direction), stage, direction, index))
