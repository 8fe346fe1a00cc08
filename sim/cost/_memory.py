"""What is derived from a cost model's figures, kept beside them: bounded, and without influence on any answer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

#: Places (backbone, layout, device …) that are remembered.
PLACES = 256


class Kept(dict[Any, Any]):
    """A dict that starts afresh when it is full."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: Hashable, value: Any) -> None:
        if len(self) >= self.most:
            self.clear()
        super().__setitem__(key, value)


class Memory:
    """Tables by what they hold and where; each key must say all that decides its value. Empty in another process."""

    def __init__(self) -> None:
        self._tables = Kept(PLACES)

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()

    def table(self, most: int, *place: Hashable) -> Kept:
        """The table of a place, of at most so many values."""
        if place not in self._tables:
            self._tables[place] = Kept(most)
        found: Kept = self._tables[place]
        return found
