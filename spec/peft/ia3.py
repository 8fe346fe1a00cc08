"""(IA)³: scales outputs of a column-parallel BaseOp, y = l ⊙ W x, or inputs of a row-parallel one, y = W (l ⊙ x).

Liu et al. 2022, §3.3, who scale keys, values and the MLP's inner activations: here all of qkv (a scale on a query is one on its
key) and the input of fc2. Both keep the vector beside the sharded side, so that it needs no collective under tp.
"""

from __future__ import annotations

from typing import Literal

from muxtune.spec.noun import noun
from muxtune.spec.peft.base import Direction, PeftSpec, Product


@noun
class IA3(PeftSpec):
    """One vector a BaseOp: over the outputs of qkv and fc1, over the inputs of proj and fc2."""

    kind: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] = ("qkv", "fc2")

    DISPATCH = "one side is None: qkv, fc1: base's output feeds the adapter; proj, fc2: the adapter's output feeds base"
    AGGREGATE = "qkv, fc1: the adapter's output; proj, fc2: base's output"
    SHAPE = ("in", "out", "side")
    KEEPS_INPUT = False

    def __post_init__(self) -> None:
        self.check_targets()

    def width(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """Length of the vector on one shard."""
        return out_features if column_parallel else in_features

    def parameters_on(self, in_features: int, out_features: int, column_parallel: bool = True) -> int:
        """out beside a column-parallel BaseOp, in beside a row-parallel one."""
        return self.width(in_features, out_features, column_parallel)

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """Nothing."""
        return 0

    def tensors_on(self) -> int:
        """The vector."""
        return 1

    def shape_on(self, features: tuple[int, int], column_parallel: bool, tp: int) -> tuple[int, ...]:
        """(in, out, 0: scales outputs, 1: scales inputs)."""
        return (*features, 0 if column_parallel else 1)

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> IA3:
        """It has no options."""
        return cls()

    @staticmethod
    def products(direction: Direction, tokens: int, shape: tuple[int, ...]) -> tuple[Product, ...]:
        """None."""
        return ()

    @staticmethod
    def pointwise_flops(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """One product an element; backward two for the vector and one for the input."""
        return {"forward": 1, "weights": 2, "backward": 3}[direction] * tokens * shape[1 - shape[2]]

    @staticmethod
    def elements(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """Read and written; outputs are also copied for the backward, which reads them and dy and may write the input's."""
        forward = 4 if shape[2] == 0 else 2
        return {"forward": forward, "weights": 2, "backward": 4}[direction] * tokens * shape[1 - shape[2]]

    def kept_on(self, tokens: int, features: tuple[int, int], column_parallel: bool) -> int:
        """What was scaled."""
        return tokens * self.width(*features, column_parallel)

    def feeds_base(self, column_parallel: bool) -> bool:
        """Beside a row-parallel BaseOp."""
        return not column_parallel
