"""LoRA: y = W x + (alpha / rank) · B (A x), A of shape (rank, in), B of shape (out, rank) (Hu et al. 2021, §4.1)."""

from __future__ import annotations

from typing import Literal

from muxtune.spec.noun import noun
from muxtune.spec.peft.base import Direction, PeftSpec, Product


@noun
class LoRA(PeftSpec):
    """Low-rank adapter on any of the BaseOps qkv (fused), proj, fc1 (gate and up fused), fc2."""

    kind: Literal["lora"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")

    DISPATCH = "base and adapter both get x, the adapter after its dropout"
    AGGREGATE = "base + (alpha / rank) · adapter"
    SHAPE = ("in", "out", "rank")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        self.check_targets()

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def parameters_on(self, in_features: int, out_features: int, column_parallel: bool = True) -> int:
        """rank · (in + out)."""
        return self.rank * (in_features + out_features)

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """A beside a column-parallel BaseOp, B beside a row-parallel one."""
        return self.rank * (in_features if column_parallel else out_features)

    def tensors_on(self) -> int:
        """A and B."""
        return 2

    def shape_on(self, features: tuple[int, int], column_parallel: bool, tp: int) -> tuple[int, ...]:
        """(in, out, rank)."""
        return (*features, self.rank)

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> LoRA:
        """LoRA of the shape's rank."""
        return cls(rank=shape[2])

    @staticmethod
    def products(direction: Direction, tokens: int, shape: tuple[int, ...]) -> tuple[Product, ...]:
        """h = x Aᵀ, y = h Bᵀ; backward dh = dy B, dB = dyᵀ h, dA = dhᵀ x and (unless `weights`) dx = dh A."""
        k, n, rank = shape
        if direction == "forward":
            return (tokens, rank, k), (tokens, n, rank)
        gradients = (tokens, rank, n), (n, rank, tokens), (rank, k, tokens)
        return gradients if direction == "weights" else (*gradients, (tokens, k, rank))

    @staticmethod
    def elements(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """x, the base output read and written, A and B; twice that in a backward."""
        k, n, rank = shape
        return (tokens * (k + 2 * n) + rank * (k + n)) * (1 if direction == "forward" else 2)

    def kept_on(self, tokens: int, features: tuple[int, int], column_parallel: bool) -> int:
        """h; a dropout mask is drawn again."""
        return tokens * self.rank
