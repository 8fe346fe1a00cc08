"""Orders of units in chunks: goldens by hand, the pipeline law, dependencies of chunks, units in flight."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from muxtune.spec.order import backward_keys, eager, forward_keys, gpipe, one_f_one_b
from muxtune.spec.plan import StageOrder

T_NS = 1000


def spelled(orders: Any) -> list[str]:
    """Each stage as text, unit and chunk: F0.0 F0.1 B0.1 …"""
    return [" ".join(f"{a.op[0].upper()}{a.unit}.{a.chunk}" for a in o.actions) for o in orders]


def keys(counts: list[int]) -> tuple[list[tuple[int, int]], dict[tuple[int, int], int]]:
    feed = [(0, u) for u in range(len(counts))]
    return feed, dict(zip(feed, counts, strict=True))


def test_1f1b_of_chunks_by_hand() -> None:
    feed, chunks = keys([2, 2])
    assert spelled(one_f_one_b(feed, 2, chunks=chunks)) == [
        "F0.0 F0.1 F1.0 B0.1 F1.1 B0.0 B1.1 B1.0",
        "F0.0 F0.1 B0.1 F1.0 B0.0 F1.1 B1.1 B1.0",
    ]


def test_gpipe_of_chunks_by_hand() -> None:
    feed, chunks = keys([2, 1])
    assert spelled(gpipe(feed, 1, chunks=chunks)) == ["F0.0 F0.1 F1.0 B0.1 B0.0 B1.0"]


def replay(orders: tuple[StageOrder, ...], counts: list[int], t: int = T_NS) -> int:
    """Makespan when every action takes t and starts as soon as its stage and its inputs are there; deadlock fails."""
    stages = len(orders)
    end: dict[tuple[int, str, int, int], int] = {}
    free = [0] * stages
    todo = [list(o.actions) for o in orders]
    while any(todo):
        moved = False
        for s, queue in enumerate(todo):
            while queue:
                op, u, j = str(queue[0].op), queue[0].unit, queue[0].chunk
                if op == "forward":
                    needs = [(s - 1, op, u, j)] * (s > 0) + [(s, op, u, j - 1)] * (j > 0)
                else:
                    needs = [(s + 1, op, u, j)] if s + 1 < stages else [(s, "forward", u, j)]
                    needs += [(s, op, u, j + 1)] if j + 1 < counts[u] else []
                    needs += [(s, "forward", u, counts[u] - 1)]
                if any(n not in end for n in needs):
                    break
                end[s, op, u, j] = free[s] = max([free[s], *(end[n] for n in needs)]) + t
                queue.pop(0)
                moved = True
        assert moved, "the order deadlocks"
    return max(free)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6))
def test_chunked_pipeline_law_of_the_order(stages: int, packs: int, k: int) -> None:
    feed, chunks = keys([k] * packs)
    law = 2 * (stages - 1) * T_NS + 2 * packs * k * T_NS
    assert replay(one_f_one_b(feed, stages, chunks=chunks), [k] * packs) == law


def in_flight(order: StageOrder) -> int:
    most = now = 0
    for action in order.actions:
        now += 1 if action.op == "forward" else -1
        most = max(most, now)
    return most


@given(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_orders_of_uneven_chunks_hold_and_keep_few_in_flight(stages: int, counts: list[int]) -> None:
    feed, chunks = keys(counts)
    for make in (one_f_one_b, gpipe):
        replay(make(feed, stages, chunks=chunks), counts)
    for order in one_f_one_b(feed, stages, chunks=chunks):
        cap = min(sum(counts), stages - order.stage - 1 + max(counts))
        first = min(sum(counts), stages - order.stage - 1 + counts[0])
        assert first <= in_flight(order) <= cap


@given(
    st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 12), st.integers(0, 10**6)
)
def test_eager_of_chunks_is_complete_and_takes_the_time_it_says(
    stages: int, counts: list[int], budget: int, seed: int
) -> None:
    feed, chunks = keys(counts)
    found = eager(feed, stages, lambda s, k, d: T_NS, lambda s, k: 1, [budget] * stages, chunks)
    assert replay(found.orders, counts) == found.makespan_ns
    for order in found.orders:
        assert [(0, a.unit, a.chunk) for a in order.actions if a.op == "forward"] == list(forward_keys(feed, chunks))
        assert [(0, a.unit, a.chunk) for a in order.actions if a.op == "backward"] == list(backward_keys(feed, chunks))
    uneven = eager(
        feed,
        stages,
        lambda s, k, d: 1 + (seed * (s + 2) + 7 * sum(k) + len(d)) % 9,
        lambda s, k: 1,
        [budget] * stages,
        chunks,
    )
    replay(uneven.orders, counts)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_eager_with_room_takes_no_longer_than_1f1b(stages: int, packs: int, k: int) -> None:
    feed, chunks = keys([k] * packs)
    found = eager(feed, stages, lambda *_: T_NS, lambda *_: 1, [10**6] * stages, chunks)
    assert found.makespan_ns == 2 * (stages - 1) * T_NS + 2 * packs * k * T_NS
