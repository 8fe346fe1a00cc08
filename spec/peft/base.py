"""PeftSpec: what every PEFT method says about itself (hooked BaseOps, parameters, rank of its small operators)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muxtune.spec.noun import noun
from muxtune.spec.registry import plugins

#: The BaseOps of a decoder layer, in the order in which a forward meets them (MuxTune §3.2).
TARGETS = ("qkv", "proj", "fc1", "fc2")


@noun
class PeftSpec:
    """Base of every PEFT method.

    A method names the BaseOps it hooks (`targets`) and counts its parameters on one BaseOp. Dispatch (who gets which
    input) and Aggregate (how outputs are combined) are stated as texts here and done by the torch file of the same name.
    """

    kind: str
    targets: tuple[str, ...]

    #: Dispatch and Aggregate rule, for humans (MuxTune Fig. 7).
    DISPATCH = ""
    AGGREGATE = ""

    def parameters_on(self, in_features: int, out_features: int) -> int:
        """Trainable parameters on one BaseOp of shape (in, out)."""
        raise NotImplementedError

    def replicated_on(self, in_features: int, out_features: int, column_parallel: bool) -> int:
        """Those parameters on one tp rank's shard of a BaseOp that every tp rank holds whole and whose gradients are summed."""
        raise NotImplementedError

    def tensors_on(self) -> int:
        """Trainable tensors on one BaseOp."""
        raise NotImplementedError

    def operator(self) -> tuple[str, int]:
        """(operator family, rank) of the adapter's compute in the operator catalogue."""
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """A field of type PeftSpec is read as the noun that its `kind` names, never as the bare base class."""
        if cls is not PeftSpec:
            return handler(source)
        choices = {kind: handler.generate_schema(found) for kind, found in peft_kinds().items()}
        return {"type": "tagged-union", "choices": choices, "discriminator": "kind"}


def peft_kinds() -> dict[str, type[PeftSpec]]:
    """Every PEFT method by kind."""
    return plugins("peft", Path(__file__).parent, "muxtune.spec.peft", PeftSpec)
