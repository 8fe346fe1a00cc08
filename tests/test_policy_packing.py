"""Bins: no packing of first-fit-decreasing is beaten by a wrong bound, exact search proves what brute force finds."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.packing import Packing, first_fit_decreasing, lower_bound, pack

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def fewest(sizes: list[int], capacity: int) -> int:
    """By trying every assignment."""
    found = len(sizes)
    for places in product(range(len(sizes)), repeat=len(sizes)):
        loads = [0] * len(sizes)
        for size, place in zip(sizes, places, strict=True):
            loads[place] += size
        if max(loads) <= capacity:
            found = min(found, sum(load > 0 for load in loads))
    return found


def require_packed(packing: Packing, sizes: list[int], capacity: int) -> None:
    assert sorted(i for b in packing.bins for i in b) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in b) for b in packing.bins]
    assert max(loads) <= capacity
    assert loads == sorted(loads, reverse=True)


@given(sizes=SIZES, room=st.integers(0, 8))
def test_exact_packing_equals_brute_force(sizes: list[int], room: int) -> None:
    capacity = max(sizes) + room
    exact, greedy, least = pack(sizes, capacity), first_fit_decreasing(sizes, capacity), fewest(sizes, capacity)
    require_packed(exact, sizes, capacity)
    require_packed(greedy, sizes, capacity)
    assert len(exact.bins) == exact.bound == least
    assert lower_bound(sizes, capacity) <= least <= len(greedy.bins)


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=64), nodes=st.integers(1, 50))
def test_a_limited_search_is_never_worse_than_greedy_and_never_claims_too_much(sizes: list[int], nodes: int) -> None:
    capacity = max(512, *sizes)
    limited, greedy = pack(sizes, capacity, nodes), first_fit_decreasing(sizes, capacity)
    require_packed(limited, sizes, capacity)
    assert lower_bound(sizes, capacity) <= limited.bound <= len(limited.bins) <= len(greedy.bins)


def test_exact_finds_what_first_fit_decreasing_misses() -> None:
    sizes = [8, 5, 5, 3, 3, 2, 2]  # 28 tokens: 8 + 3 + 3 and 5 + 5 + 2 + 2
    assert first_fit_decreasing(sizes, 14).bins == ((0, 1), (2, 3, 4, 5), (6,))
    found = pack(sizes, 14)
    assert (found.bins, found.bound, found.proven) == (((0, 3, 4), (1, 2, 5, 6)), 2, True)


@pytest.mark.parametrize(
    ("sizes", "bound"),
    [([6, 6, 6], 3), ([5, 5, 5], 2), ([7, 3, 3], 2), ([1], 1), ([6, 5, 5, 4, 4], 3)],
)
def test_bound_by_hand(sizes: list[int], bound: int) -> None:
    assert lower_bound(sizes, 10) == bound
