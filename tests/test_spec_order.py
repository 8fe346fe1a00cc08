"""Orders across clocks: goldens by hand, and what every order must do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.spec.order import Template, bucket_major, eager, feed_of, gpipe, one_f_one_b, round_robin
from muxtune.spec.plan import Bucket, Part, StageOrder, Unit


def feed(units: int) -> tuple[tuple[int, int], ...]:
    return tuple((0, u) for u in range(units))


def spelled(orders: Sequence[StageOrder]) -> list[str]:
    """Each stage as text: F0 F1 B0 …"""
    return [" ".join(f"{a.op[0].upper()}{a.unit}" for a in o.actions) for o in orders]


def bucket(htask: int, units: int) -> Bucket:
    return Bucket(
        htasks=(htask,),
        units=tuple(Unit(parts=(Part(htask=htask, task=f"t{htask}", slots=(u,)),)) for u in range(units)),
    )


def test_feeds() -> None:
    buckets = [bucket(0, 2), bucket(1, 3)]
    assert bucket_major(buckets) == ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    assert round_robin(buckets) == ((0, 0), (1, 0), (0, 1), (1, 1), (1, 2))


def test_a_plan_without_feed_runs_bucket_after_bucket(tiny_state: Any, hand_plan: Any) -> None:
    groups = [["t0"], ["t1"], ["t2"], ["t3"]]
    plain = hand_plan(tiny_state(), groups).instances[0]
    assert feed_of(plain) == bucket_major(plain.buckets)
    turned = hand_plan(tiny_state(), groups, feed=round_robin(plain.buckets)).instances[0]
    assert feed_of(turned) == round_robin(plain.buckets)


def test_1f1b_by_hand() -> None:
    assert spelled(one_f_one_b(feed(4), 3)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_1f1b_with_fewer_units_than_stages() -> None:
    assert spelled(one_f_one_b(feed(1), 3)) == ["F0 B0"] * 3
    assert spelled(one_f_one_b(feed(2), 3)) == ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]


def test_gpipe_by_hand() -> None:
    assert spelled(gpipe(feed(3), 2)) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_orders_name_bucket_and_step() -> None:
    actions = one_f_one_b([(3, 7)], 1, step=2)[0].actions
    assert [(a.op, a.bucket, a.unit, a.step) for a in actions] == [("forward", 3, 7, 2), ("backward", 3, 7, 2)]


def same(latency_ns: int, held: int, budget: Sequence[int], units: int) -> Template:
    return eager(feed(units), len(budget), lambda *_: latency_ns, lambda *_: held, budget)


def test_eager_by_hand() -> None:
    # Stage 1 is free at 2 with B0 and F1 both ready: backward first.
    found = same(1, 1, [9, 9], 2)
    assert spelled(found.orders) == ["F0 F1 B0 B1", "F0 B0 F1 B1"]
    assert found.makespan_ns == 6


def test_eager_waits_for_memory() -> None:
    found = same(1, 1, [1, 9], 2)
    assert spelled(found.orders) == ["F0 B0 F1 B1", "F0 B0 F1 B1"]
    assert found.makespan_ns == 8


def test_eager_admits_one_unit_whatever_the_budget() -> None:
    assert same(1, 5, [0, 0], 2).orders == same(1, 1, [1, 1], 2).orders


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("units", [1, 2, 5, 9])
def test_eager_under_the_1f1b_cap_is_1f1b(stages: int, units: int) -> None:
    """Equal times and room for S−s units: the same orders, and exactly 2(S−1)t + 2Ut."""
    found = same(7, 1, [stages - s for s in range(stages)], units)
    assert found.orders == one_f_one_b(feed(units), stages)
    assert found.makespan_ns == 2 * (stages - 1) * 7 + 2 * units * 7


class Replay:
    """Start and end of every action when each starts as soon as its stage and its input are there."""

    def __init__(self, orders: Sequence[StageOrder], latency: dict[Any, int]) -> None:
        self.orders, self.latency = orders, latency
        self.start: dict[tuple[int, str, int], int] = {}
        self.end: dict[tuple[int, str, int], int] = {}
        todo = [[(o.stage, a.op, a.unit) for a in o.actions] for o in orders]
        while any(todo):
            moved = False
            for stage in todo:
                while stage and self.ready(stage[0]) is not None:
                    self.run(stage.pop(0))
                    moved = True
            assert moved, "the order deadlocks"
        self.makespan = max(self.end.values())

    def ready(self, action: tuple[int, str, int]) -> int | None:
        """When the input of an action is there; None while nothing is known."""
        stage, op, unit = action
        if op == "forward":
            return 0 if stage == 0 else self.end.get((stage - 1, op, unit))
        last = stage == len(self.orders) - 1
        return self.end.get((stage, "forward", unit) if last else (stage + 1, op, unit))

    def run(self, action: tuple[int, str, int]) -> None:
        stage, op, unit = action
        ready = self.ready(action)
        assert ready is not None
        free = max((e for (s, _, _), e in self.end.items() if s == stage), default=0)
        self.start[action] = max(free, ready)
        self.end[action] = self.start[action] + self.latency[stage, unit, op]


CASES = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(0, 10**6))


def eager_case(stages: int, units: int, seed: int) -> tuple[Template, Replay, dict[Any, int], list[int]]:
    draw = Random(seed)
    latency = {
        (s, u, op): draw.randint(1, 9) for s in range(stages) for u in range(units) for op in ("forward", "backward")
    }
    held = {(s, u): draw.randint(1, 4) for s in range(stages) for u in range(units)}
    budget = [draw.randint(1, 12) for _ in range(stages)]
    template = eager(feed(units), stages, lambda s, k, d: latency[s, k[1], d], lambda s, k: held[s, k[1]], budget)
    return template, Replay(template.orders, latency), held, budget


@given(CASES)
def test_eager_is_complete_and_takes_the_time_it_says(case: tuple[int, int, int]) -> None:
    stages, units, _ = case
    template, replay, _, _ = eager_case(*case)
    assert len(template.orders) == stages
    for order in template.orders:
        runs = [(a.op, a.unit) for a in order.actions]
        assert [u for op, u in runs if op == "forward"] == list(range(units))
        assert [u for op, u in runs if op == "backward"] == list(range(units))
        assert all(runs.index(("forward", u)) < runs.index(("backward", u)) for u in range(units))
    assert replay.makespan == template.makespan_ns


@given(CASES)
def test_eager_last_stage_turns_at_once(case: tuple[int, int, int]) -> None:
    template, _, _, _ = eager_case(*case)
    assert spelled(template.orders)[-1] == " ".join(f"F{u} B{u}" for u in range(case[1]))


@given(CASES)
def test_eager_keeps_to_the_budget(case: tuple[int, int, int]) -> None:
    template, _, held, budget = eager_case(*case)
    for order in template.orders:
        inside: set[int] = set()
        for action in order.actions:
            inside ^= {action.unit}
            assert len(inside) <= 1 or sum(held[order.stage, u] for u in inside) <= budget[order.stage]


@given(CASES)
def test_eager_prefers_backward(case: tuple[int, int, int]) -> None:
    """When a forward starts, no backward of its stage is ready."""
    template, replay, _, _ = eager_case(*case)
    for order in template.orders:
        runs = [(order.stage, a.op, a.unit) for a in order.actions]
        for index, action in enumerate(runs):
            backwards = [replay.ready(a) for a in runs[index:] if a[1] == "backward"]
            if action[1] == "forward":
                assert all(ready is not None and ready > replay.start[action] for ready in backwards)


@given(CASES)
def test_eager_conserves_work(case: tuple[int, int, int]) -> None:
    """A stage idles only while no backward is ready and its next forward is not there or does not fit."""
    template, replay, held, budget = eager_case(*case)
    for order in template.orders:
        runs = [(order.stage, a.op, a.unit) for a in order.actions]
        inside: set[int] = set()
        free = 0
        for index, action in enumerate(runs):
            start = replay.start[action]
            if start > free:
                waiting = [a for a in runs[index:] if a[1] == "backward"]
                forward = next((a for a in runs[index:] if a[1] == "forward"), None)
                if forward is not None and fits(order.stage, inside, forward[2], held, budget):
                    waiting.append(forward)
                assert all((replay.ready(a) or 0) >= start for a in waiting)
            inside ^= {action[2]}
            free = replay.end[action]


def fits(stage: int, inside: set[int], unit: int, held: dict[Any, int], budget: Sequence[int]) -> bool:
    return not inside or sum(held[stage, u] for u in (*inside, unit)) <= budget[stage]
