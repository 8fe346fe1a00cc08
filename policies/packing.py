"""Bin packing of samples into token-bounded micro-batches: first-fit-decreasing, and an exact search for small cases.

Fewest bins of load ≤ capacity. The bound is L2 of Martello and Toth (1990): for a threshold a, items above capacity − a
need a bin each, and what they leave must hold the items of at least a.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.spec.noun import noun

Bins = tuple[tuple[int, ...], ...]


@noun
class Packing:
    """Item indices of each bin, fullest bin first; `bound` is the fewest bins that any packing can have."""

    bins: Bins
    bound: int
    nodes: int = 0

    @property
    def proven(self) -> bool:
        """Whether no packing has fewer bins."""
        return len(self.bins) == self.bound


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> Packing:
    """Largest item first, each into the first bin with room. No size may exceed the capacity."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in _descending(sizes):
        place = next((b for b, free in enumerate(room) if free >= sizes[item]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= sizes[item]
    return Packing(bins=_ordered(bins, sizes), bound=lower_bound(sizes, capacity))


def pack(sizes: Sequence[int], capacity: int, node_limit: int = 4000) -> Packing:
    """First-fit-decreasing, improved by depth-first search until it is proven least or the nodes are spent."""
    greedy = first_fit_decreasing(sizes, capacity)
    if greedy.proven:
        return greedy
    search = _Search(sizes, capacity, len(greedy.bins), greedy.bound, node_limit)
    search.place(0, [], [])
    bins = _ordered(search.best, sizes) if search.best else greedy.bins
    # A search that ran to its end has shown that no packing is better than the best one seen.
    bound = len(bins) if search.nodes < node_limit else greedy.bound
    return Packing(bins=bins, bound=bound, nodes=search.nodes)


def lower_bound(sizes: Sequence[int], capacity: int) -> int:
    """L2: the largest over thresholds a ≤ capacity / 2 of the bins that items of at least a need."""
    best = 0
    for a in sorted({0, *(s for s in sizes if 2 * s <= capacity)}):
        large = sum(s > capacity - a for s in sizes)
        middle = [s for s in sizes if capacity < 2 * s <= 2 * (capacity - a)]
        small = sum(s for s in sizes if a <= s and 2 * s <= capacity)
        left = len(middle) * capacity - sum(middle)
        best = max(best, large + len(middle) + max(0, -(-(small - left) // capacity)))
    return best


class _Search:
    """Depth-first branch and bound: the next largest item goes into each bin of different room, or into a new one."""

    def __init__(self, sizes: Sequence[int], capacity: int, upper: int, bound: int, node_limit: int) -> None:
        self.sizes, self.capacity, self.upper, self.bound, self.node_limit = sizes, capacity, upper, bound, node_limit
        self.items = _descending(sizes)
        self.left = [sum(sizes[i] for i in self.items[k:]) for k in range(len(self.items) + 1)]
        self.nodes = 0
        self.best: list[list[int]] = []

    def place(self, index: int, bins: list[list[int]], room: list[int]) -> None:
        """Place items from `index` on; stops when the bound is met or the nodes are spent."""
        if len(bins) >= self.upper or self.upper == self.bound or self.nodes >= self.node_limit:
            return
        self.nodes += 1
        if index == len(self.items):
            self.upper, self.best = len(bins), [list(b) for b in bins]
            return
        item = self.items[index]
        size = self.sizes[item]
        for b, free in sorted(enumerate(room), key=lambda x: (x[1], x[0])):
            if free >= size and free not in room[:b]:
                bins[b].append(item)
                room[b] -= size
                self.place(index + 1, bins, room)
                bins[b].pop()
                room[b] += size
        more = max(1, -(-(self.left[index] - sum(room)) // self.capacity))
        if len(bins) + more < self.upper:
            self.place(index + 1, [*bins, [item]], [*room, self.capacity - size])


def _descending(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def _ordered(bins: Sequence[Sequence[int]], sizes: Sequence[int]) -> Bins:
    """Fullest bin first, items ascending: equal packings look equal."""
    made = (tuple(sorted(b)) for b in bins)
    return tuple(sorted(made, key=lambda b: (-sum(sizes[i] for i in b), b)))
