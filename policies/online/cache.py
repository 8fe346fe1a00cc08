"""PlanCache: answers of re-plans by question, at most so many; the one that was asked longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
SIZE = 256


class PlanCache(Generic[T]):
    """Remembers answers. What a re-plan decides never depends on it: a hit is what a miss would find again.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: int = SIZE) -> None:
        if size < 1:
            raise ValueError(f"size={size}: a cache holds at least 1 answer")
        self.size, self.hits, self.misses = size, 0, 0
        self._answers: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Hashable) -> T | None:
        """The answer, and a hit; or None, and a miss."""
        found = self._answers.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._answers.move_to_end(key)
        return found

    def put(self, key: Hashable, answer: T) -> None:
        """Remember an answer."""
        self._answers[key] = answer
        while len(self._answers) > self.size:
            self._answers.popitem(last=False)
