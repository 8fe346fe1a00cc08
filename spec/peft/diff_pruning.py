"""Diff-Pruning: y = W x + (M ⊙ δ) x with a fixed sparse mask M (Guo et al. 2021, §2; MuxTune's selective family).

The paper learns M by an L0 penalty; here M is drawn once from the task's seed: in every row (column-parallel) or column
(row-parallel) of W every (1 / density)-th weight from a random start, so that all tp shards hold equally many.
"""

from __future__ import annotations

from typing import Literal

from muxtune.spec.noun import noun
from muxtune.spec.peft.base import Direction, PeftSpec, Product


@noun
class DiffPruning(PeftSpec):
    """Trains the share `density` of a BaseOp's weights as differences to the frozen ones.

    Computed as a dense product with the scattered differences: its work does not fall with the density.
    """

    kind: Literal["diff-pruning"] = "diff-pruning"
    density: float = 0.005
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")

    DISPATCH = "base and adapter both get x"
    AGGREGATE = "base + adapter"
    SHAPE = ("in", "out")

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 0.5:
            raise ValueError(f"density={self.density}: must be above 0 and at most 0.5")
        self.check_targets()

    def trained(self, features: int) -> int:
        """Trainable weights of a row or column of so many."""
        return max(1, round(self.density * features))

    def parameters_on(self, in_features: int, out_features: int, column_parallel: bool = True) -> int:
        """About density · in · out: equally many in each row of a column-parallel shard, in each column of a row-parallel one."""
        if column_parallel:
            return out_features * self.trained(in_features)
        return in_features * self.trained(out_features)

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """Nothing: the differences are sharded as the weights are."""
        return 0

    def tensors_on(self) -> int:
        """The differences."""
        return 1

    def shape_on(self, features: tuple[int, int], column_parallel: bool, tp: int) -> tuple[int, ...]:
        """(in, out)."""
        return features

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> DiffPruning:
        """The default density: the work does not depend on it."""
        return cls()

    @staticmethod
    def products(direction: Direction, tokens: int, shape: tuple[int, ...]) -> tuple[Product, ...]:
        """x Dᵀ; backward dD = dyᵀ x and (unless `weights`) dx = dy D."""
        k, n = shape
        if direction == "forward":
            return ((tokens, n, k),)
        return ((n, k, tokens),) if direction == "weights" else ((n, k, tokens), (tokens, k, n))

    @staticmethod
    def elements(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """x, the base output read and written, and D cleared and read; backward x, dy twice, dx, dD and D."""
        k, n = shape
        passes = {"forward": k + 2 * n, "weights": k + n, "backward": 2 * (k + n)}[direction]
        return tokens * passes + k * n * (3 if direction == "backward" else 2)

    def kept_on(self, tokens: int, features: tuple[int, int], column_parallel: bool) -> int:
        """Nothing: D is scattered again."""
        return 0

    def transient_on(self, features: tuple[int, int]) -> int:
        """D and its gradient."""
        return 2 * features[0] * features[1]
