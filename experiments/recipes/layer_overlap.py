"""Four interleaved tasks on one layer under TP4: collectives under the compute of other tasks against none under any."""

from __future__ import annotations

from dataclasses import replace

from muxtune.experiments.recipes.base import Check, Recipe
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.stage import Site, stage_run
from muxtune.sim.streams import run_blocks
from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext, Way, stage_subgraphs
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import Layout
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Launch

TASKS, ROWS, TOKENS, RANK = 4, 8, 128, 16
WAYS: tuple[Way, Way] = ("forward", "backward")


class LayerOverlap(Recipe):
    """Forward and backward of one middle layer of LLaMA2-7B, serial launches over shallow-first launches."""

    SOURCE = "MuxTune §5.3, Fig. 18: 172.5 ms interleaved without overlap, 156.2 ms overlapped, 1.10x"
    KIND = "calibrated"
    CALIBRATED = False
    ASSUMES = (
        f"{TASKS} tasks of {ROWS} x {TOKENS} tokens, LoRA rank {RANK} on every BaseOp, tp=4 on 4xA40-nvlink",
        "roofline of the A40's data sheet at its stated fractions; a collective holds 8 CTAs and slows compute by the default",
    )

    def checks(self) -> tuple[Check, ...]:
        """One ratio."""
        cluster = parse_cluster("4xA40-nvlink")
        context = _layer()
        site = Site(context=context, device=cluster.device, link=cluster.slowest_link(range(4)))
        batches = [_batch(h) for h in range(TASKS)]

        def time_ns(by_depth: bool) -> int:
            lists = ((way, _launches(context, way, by_depth)) for way in WAYS)
            return sum(stage_run(Roofline(), site, batches, w, x, run_blocks).duration_ns for w, x in lists)

        return (
            Check(
                what="one after the other / overlapped",
                expected="paper 1.10, accepted 1.05 to 1.20",
                low=1.05,
                high=1.20,
                found=time_ns(False) / time_ns(True),
            ),
        )


def _layer() -> StageContext:
    return StageContext(
        model=replace(model_preset("llama2-7b"), layers=3),
        layout=Layout(tp=4, pp=3, layers_per_stage=(1, 1, 1)),
        stage=1,
        adapters=tuple((f"t{h}", LoRA(rank=RANK)) for h in range(TASKS)),
    )


def _batch(htask: int) -> Batch:
    row = Row(task=f"t{htask}", slot=0, sample=0, prompt_tokens=TOKENS - 1, response_tokens=1, length_tokens=TOKENS)
    return Batch(htask=htask, rows=tuple(replace(row, slot=i) for i in range(ROWS)))


def _launches(context: StageContext, way: Way, by_depth: bool) -> tuple[Launch, ...]:
    """One hTask after the other, or the compute of one depth (with its collective) of every hTask in turn."""
    serial = [
        Launch(htask=h, subgraph=s.index, stream="comm" if s.collective else "compute")
        for h in range(TASKS)
        for s in stage_subgraphs(context.layout, context.stage, way)
    ]
    return tuple(sorted(serial, key=lambda x: (x.subgraph // 2, x.htask, x.subgraph)) if by_depth else serial)
