"""What every PEFT method's torch side offers: parameters on one BaseOp, and one grouped call for several tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muxtune.spec.peft import PeftSpec
from muxtune.spec.registry import plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an adapter hangs: (in, out) of this rank's shard of the BaseOp, how that is sharded, and the device."""

    features: tuple[int, int]
    column_parallel: bool
    tp: int
    tp_rank: int
    device: torch.device


class Adapter(torch.nn.Module):
    """One task's adapter on one BaseOp of one rank. Subclasses are found by the file name of their PEFT kind."""

    def __init__(self, spec: Any, place: Place, generator: torch.Generator) -> None:
        """`generator` seeds the initial values; it stands alike on every tp rank, which cuts its shard from the whole."""
        super().__init__()
        self.spec = spec
        self.place = place

    def replicated(self) -> tuple[torch.nn.Parameter, ...]:
        """Parameters that every tp rank holds whole; their gradients are summed over tp before the step."""
        raise NotImplementedError

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[tuple[Any, int, int]]) -> Tensor:
        """Aggregate: combine the base output (tokens, out) with each (adapter, start, end)'s output for x (tokens, in)."""
        raise NotImplementedError


def adapter_classes() -> dict[str, type[Adapter]]:
    """Every runnable PEFT method by kind."""
    return plugins("executor.peft", Path(__file__).parent, "muxtune.executor.peft", Adapter)


def make_adapter(spec: PeftSpec, place: Place, generator: torch.Generator) -> Adapter:
    """The torch side of a PEFT noun on one BaseOp."""
    return adapter_classes()[spec.kind](spec, place, generator)
