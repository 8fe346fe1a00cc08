"""Layout: tensor, pipeline and data parallelism of one instance, and which layers each stage holds."""

from __future__ import annotations

from typing import Literal

from muxtune.spec.model import ModelSpec, require_layers
from muxtune.spec.noun import noun

#: `full`: of every layer only its input is kept, and a backward runs the layer's forward again (Chen et al. 2016).
Recompute = Literal["none", "full"]


@noun
class Layout:
    """tp × pp × dp ranks. `layers_per_stage` has one entry a stage; rank = (dp_index · pp + stage) · tp + tp_index.

    With `sequence_parallel` the residual stream between blocks is cut over tp along the tokens (Korthikanti et al. 2022).
    With `recompute: full` a unit in flight keeps one hidden vector a token and layer, and its backward makes one layer at a
    time again: one more forward of every layer. Final norm and head are in no layer and keep what they save.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    layers_per_stage: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("tp", "pp", "dp"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "sequence_parallel with tp=1: there is nothing to cut over; set tp above 1 or leave it out"
            )
        if len(self.layers_per_stage) != self.pp or min(self.layers_per_stage, default=0) < 1:
            raise ValueError(
                f"layers_per_stage={list(self.layers_per_stage)}: give each of pp={self.pp} stages at least 1 layer"
            )

    @property
    def name(self) -> str:
        """For people: `tp=2 pp=4 dp=1`, `sp` where sequences are cut over tp, `recompute`."""
        return f"tp={self.tp} pp={self.pp} dp={self.dp}" + "".join(
            word for word, there in ((" sp", self.sequence_parallel), (" recompute", self.recompute == "full")) if there
        )

    @property
    def ranks(self) -> int:
        """Devices of one instance."""
        return self.tp * self.pp * self.dp

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of an instance-local rank."""
        return rank // self.tp % self.pp

    def replica_of(self, rank: int) -> int:
        """Data-parallel index of an instance-local rank."""
        return rank // (self.tp * self.pp)

    def stage_peers(self, rank: int) -> tuple[int, ...]:
        """The tensor-parallel group of a rank: same stage, same replica."""
        first = rank - rank % self.tp
        return tuple(range(first, first + self.tp))

    def replica_peers(self, rank: int) -> tuple[int, ...]:
        """The data-parallel group of a rank: same stage, same shard."""
        width = self.tp * self.pp
        return tuple(rank % width + replica * width for replica in range(self.dp))

    def shard_tokens(self, tokens: int) -> int:
        """Tokens of the residual stream on one rank: all, or with sequence parallelism a tp-th, rounded up."""
        return -(-tokens // self.tp) if self.sequence_parallel else tokens

    def rank_at(self, rank: int, stage: int) -> int:
        """The rank at another stage with the same tp and dp index."""
        return rank + (stage - self.stage_of(rank)) * self.tp

    def layers_of(self, stage: int) -> range:
        """Global layer numbers of a stage."""
        first = sum(self.layers_per_stage[:stage])
        return range(first, first + self.layers_per_stage[stage])

    def is_first(self, stage: int) -> bool:
        """Whether the stage holds the embedding."""
        return stage == 0

    def is_last(self, stage: int) -> bool:
        """Whether the stage holds the head and the loss."""
        return stage == self.pp - 1


@noun
class LayoutChoice:
    """What a planner may choose before it places tasks: a layout, and the micro-batches C of a global batch."""

    layout: Layout
    microbatches: int

    @property
    def name(self) -> str:
        """For people: `tp=2 pp=4 dp=1 C=8`."""
        return f"{self.layout.name} C={self.microbatches}"


def even_layout(model: ModelSpec, *, tp: int = 1, pp: int = 1, dp: int = 1, sequence_parallel: bool = False) -> Layout:
    """Layers spread evenly over the stages; a remainder goes to the middle stages, away from embedding and head."""
    require_layers(model, pp)
    base, extra = divmod(model.layers, pp)
    first_extra = (pp - extra) // 2
    layers = tuple(base + (first_extra <= s < first_extra + extra) for s in range(pp))
    return Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=sequence_parallel, layers_per_stage=layers)
