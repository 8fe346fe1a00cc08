"""The waiting line of one backbone: groups (tenants, say) in an order that may change, jobs in a fixed order inside each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import Any

from muxtune.sim.cluster.parts import Member


class Line:
    """Jobs leave by `pop`, or by `drop` from anywhere (a cancelled job is forgotten when it comes to the head)."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[Any, int, Member]]] = {}
        self._waiting: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Member]:
        return (m for heap in self._heaps.values() for _, _, m in heap if m.index in self._waiting)

    def push(self, member: Member, group: str, key: Any) -> None:
        """Add a job; equal keys leave in the order of the trace."""
        heappush(self._heaps.setdefault(group, []), (key, member.index, member))
        self._waiting[member.index] = group

    def drop(self, member: Member) -> None:
        """Take a job out."""
        group = self._waiting.pop(member.index)
        heap = self._heaps[group]
        if heap[0][2] is member:
            heappop(heap)
            self._clean(group)
        else:
            heap.remove(next(entry for entry in heap if entry[2] is member))
            heap.sort()

    def head(self, rank: Callable[[str, Member], Any]) -> Member | None:
        """The first job of the group that `rank` puts first; ties by the head's place in the trace."""
        heaps = self._heaps
        if not heaps:
            return None
        if len(heaps) == 1:
            return next(iter(heaps.values()))[0][2]
        heads = ((rank(group, heap[0][2]), heap[0][1], heap[0][2]) for group, heap in heaps.items())
        return min(heads, key=lambda x: x[:2])[2]

    def _clean(self, group: str) -> None:
        if not self._heaps[group]:
            del self._heaps[group]
