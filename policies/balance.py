"""Balancing hTasks over buckets (MuxTune Eq. 7): multiway number partitioning by least squared deviation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

Buckets = tuple[tuple[int, ...], ...]
#: Items of an exact answer: 3^8 pairs of sets a bucket.
EXACT_ITEMS = 8


def balance(loads: Sequence[int], parts: int) -> Buckets:
    """Eq. 7: partition items into `parts` non-empty buckets with the least squared deviation of bucket loads.

    Exact for up to EXACT_ITEMS items; beyond, longest processing time first, then the best move or swap between two buckets
    until none lowers the deviation. Each bucket lists its items in ascending order; equal input gives equal output. `parts`
    must not exceed the items.
    """
    return _exact(loads, parts) if len(loads) <= EXACT_ITEMS else _longest_first(loads, parts)


def balance_gap(loads: Sequence[int], buckets: Buckets) -> float:
    """Σ loads² of the buckets above what is proven to be their least, as a part of it: 0 where it is exact."""
    if len(loads) <= EXACT_ITEMS:
        return 0.0
    squares = sum(sum(loads[i] for i in b) ** 2 for b in buckets)
    # Equal buckets, or the largest item alone and the rest equal.
    total, largest, others = sum(loads), max(loads), len(buckets) - 1
    bounds = [total**2 / len(buckets)]
    if others and largest * len(buckets) > total:
        bounds.append(largest**2 + (total - largest) ** 2 / others)
    return squares / max(bounds) - 1 if max(bounds) else 0.0


def _exact(loads: Sequence[int], parts: int) -> Buckets:
    """Dynamic programming over sets of items: the bucket of a set's first item, and the best of the rest."""
    everything = (1 << len(loads)) - 1
    square = [sum(x for i, x in enumerate(loads) if mask >> i & 1) ** 2 for mask in range(everything + 1)]
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for _ in range(parts):
        row: dict[int, tuple[int, int]] = {}
        for mask in range(1, everything + 1):
            first, choices = mask & -mask, []
            bucket = mask
            while bucket:
                if bucket & first and mask ^ bucket in best[-1]:
                    choices.append((best[-1][mask ^ bucket][0] + square[bucket], bucket))
                bucket = (bucket - 1) & mask
            if choices:
                row[mask] = min(choices)
        best.append(row)
    found: list[tuple[int, ...]] = []
    for row in reversed(best[1:]):
        bucket = row[everything][1]
        found.append(tuple(i for i in range(len(loads)) if bucket >> i & 1))
        everything ^= bucket
    return tuple(found)


def _longest_first(loads: Sequence[int], parts: int) -> Buckets:
    """Longest processing time first, then moves and swaps."""
    buckets: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        # An empty bucket is filled first, so that zero loads leave none empty.
        target = min(range(parts), key=lambda b: (bool(buckets[b]), sums[b], b))
        buckets[target].append(item)
        sums[target] += loads[item]
    while (step := _best_exchange(loads, buckets, sums)) is not None:
        _, source, target, given, taken = step
        for bucket, out, into in ((source, given, taken), (target, taken, given)):
            buckets[bucket] = [i for i in buckets[bucket] if i != out] + ([into] if into is not None else [])
            sums[bucket] = sum(loads[i] for i in buckets[bucket])
    return tuple(tuple(sorted(b)) for b in buckets)


def _best_exchange(
    loads: Sequence[int], buckets: Sequence[Sequence[int]], sums: Sequence[int]
) -> tuple[int, int, int, int, int | None] | None:
    """(change of Σ sums², from, to, item given, item taken or None) of the best exchange; None if none improves."""
    choices = []
    for source, target in product(range(len(buckets)), repeat=2):
        gap = sums[source] - sums[target]
        if gap <= 0:
            continue
        for given, taken in product(buckets[source], (None, *buckets[target])):
            moved = loads[given] - (0 if taken is None else loads[taken])
            if 0 < moved < gap:
                choices.append((2 * moved * (moved - gap), source, target, given, taken))
    return min(choices, key=lambda c: c[:4]) if choices else None
