"""Bottleneck adapter, serial: y ← y + B act(A y), y the BaseOp's output with its bias (Houlsby et al. 2019, §2.1; no biases)."""

from __future__ import annotations

from typing import Literal

from muxtune.spec.noun import noun
from muxtune.spec.peft.base import Direction, PeftSpec, Product, TpSum


@noun
class Bottleneck(PeftSpec):
    """Down to `rank`, activation, up again, behind a BaseOp; proj and fc2 are the paper's places.

    Beside a row-parallel BaseOp A and B are whole on every tp rank; A meets partial outputs, whose narrow products are summed,
    and each rank adds B's part of its own share of the tokens. Beside a column-parallel one both are sharded along out.
    """

    kind: Literal["bottleneck"] = "bottleneck"
    rank: int = 16
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    targets: tuple[str, ...] = ("proj", "fc2")

    DISPATCH = "base gets x; the adapter's side is None: base's output feeds it"
    AGGREGATE = "base + adapter"
    SHAPE = ("in", "out", "rank", "shares")
    KEEPS_INPUT = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        self.check_targets()

    def parameters_on(self, in_features: int, out_features: int, column_parallel: bool = True) -> int:
        """2 · rank · out."""
        return 2 * self.rank * out_features

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """All of it beside a row-parallel BaseOp, nothing beside a column-parallel one."""
        return 0 if column_parallel else 2 * self.rank * out_features

    def tensors_on(self) -> int:
        """A and B."""
        return 2

    def shape_on(self, features: tuple[int, int], column_parallel: bool, tp: int) -> tuple[int, ...]:
        """(in, out, rank, number of ranks that share the tokens of the way up)."""
        return (*features, self.rank, 1 if column_parallel else tp)

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> Bottleneck:
        """An adapter of the shape's rank."""
        return cls(rank=shape[2])

    @staticmethod
    def products(direction: Direction, tokens: int, shape: tuple[int, ...]) -> tuple[Product, ...]:
        """h = y Aᵀ, act(h) Bᵀ; backward d act = dy B, dB, dA and (unless `weights`) dh A."""
        _, n, rank, shares = shape
        own = -(-tokens // shares)
        if direction == "forward":
            return (tokens, rank, n), (own, n, rank)
        gradients = (own, rank, n), (n, rank, own), (rank, n, tokens)
        return gradients if direction == "weights" else (*gradients, (tokens, n, rank))

    @staticmethod
    def elements(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """y copied for the backward, read, added to; backward dy twice, y, and (unless `weights`) dy passed on."""
        _, n, rank, _ = shape
        passes = {"forward": 4, "weights": 3, "backward": 5}[direction]
        return passes * tokens * n + rank * n * (2 if direction == "forward" else 4)

    def kept_on(self, tokens: int, features: tuple[int, int], column_parallel: bool) -> int:
        """The base output and h."""
        return tokens * (features[1] + self.rank)

    def tp_sum(self, tokens: int, features: tuple[int, int], column_parallel: bool, element_bytes: int) -> TpSum | None:
        """h forward, its gradient backward."""
        return TpSum(size_bytes=tokens * self.rank * element_bytes, backward=True)
