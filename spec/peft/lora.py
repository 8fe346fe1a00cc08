"""LoRA: y = W x + (alpha / rank) · B (A x), A of shape (rank, in), B of shape (out, rank) (Hu et al. 2021, §4.1)."""

from __future__ import annotations

from typing import Literal

from muxtune.spec.noun import noun
from muxtune.spec.peft.base import TARGETS, PeftSpec


@noun
class LoRA(PeftSpec):
    """Low-rank adapter on any of the BaseOps qkv (fused), proj, fc1 (gate and up fused), fc2."""

    kind: Literal["lora"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")

    DISPATCH = "base and adapter both get x"
    AGGREGATE = "base + (alpha / rank) · adapter"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={list(self.targets)}: name each of {list(TARGETS)} at most once, at least one")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def parameters_on(self, in_features: int, out_features: int) -> int:
        """rank · (in + out)."""
        return self.rank * (in_features + out_features)

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """A beside a column-parallel BaseOp, B beside a row-parallel one."""
        return self.rank * (in_features if column_parallel else out_features)

    def tensors_on(self) -> int:
        """A and B."""
        return 2

    def operator(self) -> tuple[str, int]:
        """The `lora` family at this rank."""
        return "lora", self.rank
