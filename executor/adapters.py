"""AdapterBank: all tasks' adapters of one BaseOp, and the routing of the batch that is about to run through it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from muxtune.executor.peft.base import Adapter

Segments = Sequence[tuple[str, int, int]]


class AdapterBank:
    """Held by a multiplexed linear. `bind` is called right before each forward, so interleaved hTasks never mix."""

    def __init__(self, target: str, column_parallel: bool, features: tuple[int, int]) -> None:
        self.target = target
        self.column_parallel = column_parallel
        self.features = features
        self.adapters: dict[str, Adapter] = {}
        self.segments: Segments = ()

    def bind(self, segments: Segments) -> None:
        """Route the next forward: (task, first token, end token) on the flat token axis."""
        self.segments = segments

    def aggregate(self, x: Tensor, out: Tensor) -> Tensor:
        """Add every routed adapter to the base output in place; x (tokens, in), out (tokens, out), not a view."""
        entries: dict[type[Adapter], list[tuple[Adapter, int, int]]] = {}
        for task, start, end in self.segments:
            if task in self.adapters:
                adapter = self.adapters[task]
                entries.setdefault(type(adapter), []).append((adapter, start, end))
        for kind, group in entries.items():
            out = kind.apply_group(out, x, group)
        return out
