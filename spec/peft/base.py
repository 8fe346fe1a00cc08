"""PeftSpec: what every PEFT method says about itself: hooked BaseOps, parameters, and the work of its small operator.

flops = Σ 2·rows·columns·depth over `products` + pointwise; bytes = `elements` · element size.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from muxtune.spec.noun import noun
from muxtune.spec.registry import plugins

#: The BaseOps of a decoder layer, in the order in which a forward meets them (MuxTune §3.2).
TARGETS = ("qkv", "proj", "fc1", "fc2")

#: BaseOps whose output features are sharded over tp; the others' input features are.
COLUMN_PARALLEL = ("qkv", "fc1")

#: `weights`: an adapter whose input needs no gradient computes weight gradients only.
Direction = Literal["forward", "backward", "weights"]
#: (rows, columns, depth) of one matrix product.
Product = tuple[int, int, int]


@noun
class TpSum:
    """What tp ranks sum inside an adapter's forward, and whether its backward sums as much again."""

    size_bytes: int
    backward: bool


@noun
class PeftSpec:
    """Base of every PEFT method.

    A method names the BaseOps it hooks (`targets`) and counts its parameters and its work on one BaseOp. Dispatch (who gets
    which input) and Aggregate (how outputs are combined) are stated as texts here and done by the torch file of the same name.
    """

    kind: str
    targets: tuple[str, ...]

    #: Dispatch and Aggregate rule, for humans (MuxTune Fig. 7).
    DISPATCH = ""
    AGGREGATE = ""
    #: Names of what decides the operator's cost beside tokens; (in, out) of the BaseOp's shard come first.
    SHAPE = cast("tuple[str, ...]", ("in", "out"))
    #: Whether the BaseOp's input is kept for the backward (once for all adapters that keep it).
    KEEPS_INPUT = True

    def check_targets(self) -> None:
        """Refuse targets that are no BaseOps, or none at all (ValueError)."""
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={list(self.targets)}: name each of {list(TARGETS)} at most once, at least one")

    def parameters_on(self, in_features: int, out_features: int, column_parallel: bool = True) -> int:
        """Trainable parameters on one tp rank's shard (in, out) of a BaseOp."""
        raise NotImplementedError

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """Those parameters on one tp rank's shard of a BaseOp that every tp rank holds whole and whose gradients are summed."""
        raise NotImplementedError

    def tensors_on(self) -> int:
        """Trainable tensors on one BaseOp."""
        raise NotImplementedError

    def shape_on(self, features: tuple[int, int], column_parallel: bool, tp: int) -> tuple[int, ...]:
        """The operator's numbers, named by SHAPE, on one tp rank's shard (in, out)."""
        raise NotImplementedError

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> PeftSpec:
        """A noun whose operator has this shape, for measuring it."""
        raise NotImplementedError

    @staticmethod
    def products(direction: Direction, tokens: int, shape: tuple[int, ...]) -> tuple[Product, ...]:
        """The matrix products of the operator, one kernel each."""
        raise NotImplementedError

    @staticmethod
    def pointwise_flops(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """Flops outside the products; 0 where they are a rank's width and do not count."""
        return 0

    @staticmethod
    def elements(direction: Direction, tokens: int, shape: tuple[int, ...]) -> int:
        """Elements read and written, each operand and result once."""
        raise NotImplementedError

    def kept_on(self, tokens: int, features: tuple[int, int], column_parallel: bool) -> int:
        """Elements kept from forward to backward beside the BaseOp's input."""
        raise NotImplementedError

    def transient_on(self, features: tuple[int, int]) -> int:
        """Elements in use only while the operator runs, beyond its operands and results."""
        return 0

    def feeds_base(self, column_parallel: bool) -> bool:
        """Whether the adapter runs before the BaseOp and its output is the BaseOp's input (a `None` base side)."""
        return False

    def place(self, target: str) -> int:
        """Where the adapter stands among BaseOps and adapters of a layer: before its BaseOp or behind it."""
        return 2 * TARGETS.index(target) + (0 if self.feeds_base(target in COLUMN_PARALLEL) else 1)

    def tp_sum(self, tokens: int, features: tuple[int, int], column_parallel: bool, element_bytes: int) -> TpSum | None:
        """What tp ranks sum inside the adapter (tp > 1 only); None where the BaseOp's own collective is all it needs."""
        return None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """A field of type PeftSpec is read as the noun that its `kind` names, never as the bare base class."""
        if cls is not PeftSpec:
            return handler(source)
        choices = {kind: handler.generate_schema(found) for kind, found in peft_kinds().items()}
        return {"type": "tagged-union", "choices": choices, "discriminator": "kind"}


@cache
def peft_kinds() -> dict[str, type[PeftSpec]]:
    """Every PEFT method by kind."""
    return plugins("peft", Path(__file__).parent, "muxtune.spec.peft", PeftSpec)
