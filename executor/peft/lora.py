"""LoRA on a sharded BaseOp. Column-parallel: A whole, B sharded; row-parallel: A sharded, B whole.

Either way the adapter adds a partial sum to the base's partial sum, so the collective of the base serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muxtune.executor.peft.base import Adapter, Place
from muxtune.kernels.grouped_lora import Group, forward
from muxtune.spec.errors import InputError
from muxtune.spec.peft.lora import LoRA


class LoRAAdapter(Adapter):
    """A (rank, in) starts as N(0, 1/in); B (out, rank) starts at zero, so that the first forward is the backbone's."""

    spec: LoRA

    def __init__(self, spec: LoRA, place: Place, generator: torch.Generator) -> None:
        super().__init__(spec, place, generator)
        if spec.dropout > 0:
            raise InputError(f"peft.dropout={spec.dropout}: the executor runs LoRA without dropout; set it to 0")
        k, n = place.features
        shards = 1 if place.column_parallel else place.tp
        whole = torch.randn(spec.rank, k * shards, generator=generator) / (k * shards) ** 0.5
        a = whole if place.column_parallel else whole.chunk(shards, 1)[place.tp_rank]
        self.a = torch.nn.Parameter(a.contiguous().to(place.device))
        self.b = torch.nn.Parameter(torch.zeros(n, spec.rank, device=place.device))

    def replicated(self) -> tuple[torch.nn.Parameter, ...]:
        """A beside a column-parallel base, B beside a row-parallel one."""
        return (self.a,) if self.place.column_parallel else (self.b,)

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[tuple[Any, int, int]]) -> Tensor:
        """base + (alpha / rank) · B (A x), rows of each task with its own A and B."""
        groups = [Group(start=start, end=end, scale=adapter.spec.scale) for adapter, start, end in entries]
        weights = [w.to(x.dtype) for adapter, _, _ in entries for w in (adapter.a, adapter.b)]
        return forward(out, x, groups, weights)
