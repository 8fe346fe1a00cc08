"""AdapterBank: all tasks' adapters of one BaseOp, and the routing of the batch that is about to run through it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from muxtune.executor.peft.base import Adapter, Entry

Segments = Sequence[tuple[str, int, int]]


class AdapterBank:
    """Held by a multiplexed linear. `bind` is called right before each forward, so interleaved hTasks never mix.

    `blocks` is the number of parts of the whole output that are sharded one by one. `weight`, `bias` and `late_bias` are the
    linear's: a bias is added inside the BaseOp or, late, after it.
    """

    def __init__(
        self,
        target: str,
        column_parallel: bool,
        features: tuple[int, int],
        blocks: int = 1,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        late_bias: Tensor | None = None,
    ) -> None:
        self.target = target
        self.column_parallel = column_parallel
        self.features = features
        self.blocks, self.weight, self.bias, self.late_bias = blocks, weight, bias, late_bias
        self.adapters: dict[str, Adapter] = {}
        self.segments: Segments = ()
        self.counters: Tensor | None = None

    def bind(self, segments: Segments, counters: Tensor | None = None) -> None:
        """Route the next forward: (task, first token, end token) on the flat token axis, and the tokens' numbers for dropout."""
        self.segments, self.counters = segments, counters

    def dispatch(self, x: Tensor) -> Tensor:
        """The BaseOp's input: x (tokens, in), or a copy in which adapters that feed the BaseOp have replaced their rows."""
        for kind, group in self._routed().items():
            x = kind.dispatch_group(x, group)
        return x

    def aggregate(self, x: Tensor, out: Tensor) -> Tensor:
        """Combine every routed adapter with the base output in place; x (tokens, in), out (tokens, out), not a view."""
        for kind, group in self._routed().items():
            out = kind.apply_group(out, x, group, self.counters)
        return out

    def _routed(self) -> dict[type[Adapter], list[Entry]]:
        """The batch's adapters by method, in the order of spec.catalogue."""
        entries: dict[type[Adapter], list[Entry]] = {}
        for task, start, end in self.segments:
            if task in self.adapters:
                adapter = self.adapters[task]
                entries.setdefault(type(adapter), []).append((adapter, start, end))
        return entries
