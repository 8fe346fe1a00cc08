"""DoRA: y = m ⊙ (W + s B A) x / ‖W + s B A‖, one magnitude m and one norm an output (Liu et al. 2024, Eq. 5).

The norm is a constant of the backward (§4.3); it comes from ‖W‖² + 2s·(W Aᵀ)∘B + s²·(B A Aᵀ)∘B, so no in × out tensor is made.
"""

from __future__ import annotations

from typing import Literal

from muxtune.spec.noun import noun
from muxtune.spec.peft.base import Direction, PeftSpec, Product, TpSum

NORM_BYTES = 4


@noun
class DoRA(PeftSpec):
    """Low-rank direction and trained magnitude; m starts at ‖W‖, so that the first forward is the backbone's."""

    kind: Literal["dora"] = "dora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")

    DISPATCH = "base and adapter both get x"
    AGGREGATE = "m / ‖W + (alpha / rank) · B A‖ ⊙ (base + (alpha / rank) · adapter)"
    SHAPE = ("in", "out", "rank")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        self.check_targets()

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def parameters_on(self, in_features: int, out_features: int, column_parallel: bool = True) -> int:
        """rank · (in + out) + out."""
        return self.rank * (in_features + out_features) + out_features

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """A beside a column-parallel BaseOp, B and m beside a row-parallel one."""
        return self.rank * in_features if column_parallel else (self.rank + 1) * out_features

    def tensors_on(self) -> int:
        """A, B and m."""
        return 3

    def shape_on(self, features: tuple[int, int], column_parallel: bool, tp: int) -> tuple[int, ...]:
        """(in, out, rank)."""
        return (*features, self.rank)

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> DoRA:
        """DoRA of the shape's rank."""
        return cls(rank=shape[2])

    @staticmethod
    def products(direction: Direction, tokens: int, shape: tuple[int, ...]) -> tuple[Product, ...]:
        """LoRA's, and forward W Aᵀ, A Aᵀ and B (A Aᵀ) for the norm."""
        k, n, rank = shape
        if direction == "forward":
            return (n, rank, k), (rank, rank, k), (n, rank, rank), (tokens, rank, k), (tokens, n, rank)
        gradients = (tokens, rank, n), (n, rank, tokens), (rank, k, tokens)
        return gradients if direction == "weights" else (*gradients, (tokens, k, rank))

    @staticmethod
    def pointwise_flops(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """The magnitude: one product an output; backward one for it and two for its own gradient."""
        return (1 if direction == "forward" else 3) * tokens * shape[1]

    @staticmethod
    def elements(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """LoRA's, the kept outputs, and forward the frozen weight for the norm."""
        k, n, rank = shape
        if direction == "forward":
            return tokens * (k + 4 * n) + rank * (k + n) + k * n
        return 2 * (tokens * (k + 2 * n) + rank * (k + n)) + 2 * tokens * n

    def kept_on(self, tokens: int, features: tuple[int, int], column_parallel: bool) -> int:
        """h, the outputs before the magnitude, and the norms."""
        return tokens * (self.rank + features[1]) + features[1]

    def tp_sum(self, tokens: int, features: tuple[int, int], column_parallel: bool, element_bytes: int) -> TpSum | None:
        """The squared norms of a row-parallel BaseOp's outputs."""
        return None if column_parallel else TpSum(size_bytes=features[1] * NORM_BYTES, backward=False)
