"""What every PEFT method's torch side offers: parameters on one BaseOp, and one grouped call for several tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muxtune.spec.peft import PeftSpec
from muxtune.spec.registry import plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an adapter hangs.

    `features` is (in, out) of this rank's shard of the BaseOp. `blocks` is the number of equal parts of the whole output that are
    sharded one by one (2 for [gate; up], else 1). `weight` (out, in) is the shard itself, `bias` (out,) what the BaseOp adds
    inside and `late_bias` what is added after it; `group` sums over tp (None where tp is 1). `key` names the place for dropout.
    """

    features: tuple[int, int]
    column_parallel: bool
    tp: int
    tp_rank: int
    device: torch.device
    blocks: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    late_bias: Tensor | None = None
    group: Any = None
    key: int = 0

    @property
    def whole(self) -> tuple[int, int]:
        """(in, out) of the unsharded BaseOp."""
        k, n = self.features
        return (k, n * self.tp) if self.column_parallel else (k * self.tp, n)

    def cut_in(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor along its BaseOp's inputs."""
        return whole if self.column_parallel else whole.chunk(self.tp, dim)[self.tp_rank].contiguous()

    def cut_out(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor along its BaseOp's outputs; of a gated fc1 the cuts of gate and up are joined."""
        if not self.column_parallel or self.tp == 1:
            return whole
        return torch.cat([b.chunk(self.tp, dim)[self.tp_rank] for b in whole.chunk(self.blocks, dim)], dim)

    def sum_over_tp(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over tp in place, as one message."""
        if self.group is None or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat, group=self.group)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


class Adapter(torch.nn.Module):
    """One task's adapter on one BaseOp of one rank. Subclasses are found by the file name of their PEFT kind.

    `steps_taken` says how many optimizer steps the task has taken: a dropout draws anew in each.
    """

    def __init__(self, spec: Any, place: Place, generator: torch.Generator) -> None:
        """`generator` seeds the initial values; it stands alike on every tp rank, which cuts its shard from the whole."""
        super().__init__()
        self.spec = spec
        self.place = place
        self.steps_taken: Callable[[], int] = lambda: 0

    def _parameter(self, value: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(value.float().contiguous().to(self.place.device))

    def replicated(self) -> tuple[torch.nn.Parameter, ...]:
        """Parameters that every tp rank holds whole; their gradients are summed over tp before the step."""
        return ()

    @staticmethod
    def dispatch_group(x: Tensor, entries: Sequence[Entry]) -> Tensor:
        """Dispatch: the BaseOp's input (tokens, in); rows of adapters whose output feeds it are replaced, never in place."""
        return x

    @staticmethod
    def apply_group(out: Tensor, x: Tensor, entries: Sequence[Entry], counters: Tensor | None) -> Tensor:
        """Aggregate: combine the base output (tokens, out) with each entry's output for its rows of x (tokens, in).

        `out` is overwritten. `counters` (tokens,) numbers the tokens of a task's step for dropout. The output needs a gradient
        above the adapters where x does.
        """
        return out


#: (adapter, first token, end token) on the flat token axis.
Entry = tuple[Any, int, int]


@cache
def adapter_classes() -> dict[str, type[Adapter]]:
    """Every runnable PEFT method by kind."""
    return plugins("executor.peft", Path(__file__).parent, "muxtune.executor.peft", Adapter)


def make_adapter(spec: PeftSpec, place: Place, generator: torch.Generator) -> Adapter:
    """The torch side of a PEFT noun on one BaseOp."""
    return adapter_classes()[spec.kind](spec, place, generator)
