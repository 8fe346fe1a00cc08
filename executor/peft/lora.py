"""LoRA on a sharded BaseOp. Column-parallel: A whole, B sharded; row-parallel: A sharded, B whole.

Either way the adapter adds a partial sum to the base's partial sum, so the collective of the base serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muxtune.executor.peft.base import Adapter, Entry, Place
from muxtune.kernels.grouped_lora import Dropout, Group, forward
from muxtune.spec.peft.lora import LoRA


class LoRAAdapter(Adapter):
    """A (rank, in) starts as N(0, 1/in); B (out, rank) starts at zero, so that the first forward is the backbone's."""

    spec: LoRA

    def __init__(self, spec: LoRA, place: Place, generator: torch.Generator) -> None:
        super().__init__(spec, place, generator)
        width = place.whole[0]
        whole = torch.randn(spec.rank, width, generator=generator) / width**0.5
        self.a = self._parameter(place.cut_in(whole, 1))
        self.b = self._parameter(torch.zeros(place.features[1], spec.rank))

    def replicated(self) -> tuple[torch.nn.Parameter, ...]:
        """A beside a column-parallel base, B beside a row-parallel one."""
        return (self.a,) if self.place.column_parallel else (self.b,)

    def group(self, start: int, end: int) -> Group:
        """Its rows for the kernel; dropout is keyed by place, step and the input's number in the whole BaseOp."""
        place, rate = self.place, self.spec.dropout
        if rate == 0:
            return Group(start=start, end=end, scale=self.spec.scale)
        first = 0 if place.column_parallel else place.tp_rank * place.features[0]
        dropout = Dropout(rate=rate, key=place.key, step=self.steps_taken(), first_column=first)
        return Group(start=start, end=end, scale=self.spec.scale, dropout=dropout)

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[Entry], counters: Tensor | None) -> Tensor:
        """base + (alpha / rank) · B (A drop(x)), rows of each task with its own A and B."""
        groups = [adapter.group(start, end) for adapter, start, end in entries]
        weights = [w.to(x.dtype) for adapter, _, _ in entries for w in (adapter.a, adapter.b)]
        return forward(out, x, groups, weights, counters)
