"""What is lost without task fusion (TF), operator orchestration (OO) or chunk alignment (CA), at a light and a heavy load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from muxtune.experiments.recipes.base import Check, Recipe
from muxtune.experiments.recipes.memory_capacity import LENGTHS
from muxtune.policies.arrange import arrange
from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.build import make_instance
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import estimate
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.noun import noun
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task, Workload

STAGES = 4
#: `a ≫ b`: at least so many times.
MUCH = 2.0


@noun
class Load:
    """So many tasks, lengths of 64, 128 and 256 in turn, with so many samples each in C micro-batches; the paper's losses."""

    name: str
    tasks: int
    samples: int
    microbatches: int
    paper: str

    @property
    def tokens(self) -> int:
        """Billed tokens of all tasks in a micro-batch."""
        lengths = list(LENGTHS.values())
        return sum(lengths[i % 3] * self.samples for i in range(self.tasks)) // self.microbatches


LIGHT = Load(name="light", tasks=16, samples=8, microbatches=8, paper="TF 36.1, OO 30.3, CA 22.5 %")
HEAVY = Load(name="heavy", tasks=4, samples=64, microbatches=4, paper="CA 34.3, OO 25.1, TF 6.25 %")


class AblationShape(Recipe):
    """Billed throughput lost by each part that is left out of a whole plan, everything else as it was."""

    SOURCE = f"MuxTune §5.3, Fig. 16, LLaMA7B on a 4-GPU pipeline: light {LIGHT.paper}; heavy {HEAVY.paper}"
    KIND = "calibrated"
    CALIBRATED = False
    ASSUMES = (
        "roofline of the A40's data sheet on 4xA40-nvlink, pp=4, rank-16 LoRA on every BaseOp; `muxtune:charge=exact`",
        *(
            f"{x.name}: {x.tasks} tasks of {x.samples} samples, C={x.microbatches}, {x.tokens:,} billed tokens a micro-batch"
            for x in (LIGHT, HEAVY)
        ),
        "without TF: one hTask a task; without OO: a flush after each hTask; without CA: the same hTasks, zero-padded",
        "the paper states neither its loads nor what replaces a part; at 8 tasks instead of 16 CA and OO change places",
    )
    MISSES: Mapping[str, str] = {
        "heavy: OO / TF": "chunks give the pipeline so many units that a flush costs little; the paper does not say what its "
        "25 % consists of",
    }

    def checks(self) -> tuple[Check, ...]:
        """Three figures and two ratios a load."""
        return tuple(self._checks())

    def _checks(self) -> Iterator[Check]:
        for load, order, least in (
            (LIGHT, ("TF", "OO", "CA"), (1.0, 1.0)),
            (HEAVY, ("CA", "OO", "TF"), (1.0, MUCH)),
        ):
            lost = _lost(load)
            for part in order:
                yield Check(
                    what=f"{load.name}: lost without {part}, %",
                    expected=f"above 0 (paper {load.paper})",
                    low=0.0,
                    high=100.0,
                    found=100 * lost[part],
                )
            for more, less, ratio in zip(order, order[1:], least, strict=False):
                yield Check(
                    what=f"{load.name}: {more} / {less}",
                    expected=f"at least {ratio:g}",
                    low=ratio,
                    high=1000.0,
                    found=lost[more] / lost[less],
                )


def _state(load: Load) -> SystemState:
    names = list(LENGTHS)
    tasks = (
        Task(
            task_id=f"t{i}",
            peft=LoRA(rank=16),
            dataset=names[i % 3],
            billed_len_tokens=LENGTHS[names[i % 3]],
            global_batch_samples=load.samples,
        )
        for i in range(load.tasks)
    )
    model = model_preset("llama2-7b")
    workload = Workload(
        name=load.name, model=model, datasets=tuple(embedded_length(n) for n in names), tasks=tuple(tasks)
    )
    return SystemState(
        workload=workload,
        cluster=parse_cluster(f"{STAGES}xA40-nvlink"),
        layout=even_layout(model, pp=STAGES),
        microbatches=load.microbatches,
    )


def _lost(load: Load) -> dict[str, float]:
    """Share of the whole plan's billed throughput that is lost without each part."""
    state, cost = _state(load), Roofline()
    whole, unfused = (
        make_policy(f"muxtune:charge=exact,alignment=chunk{option}", cost).plan(state)
        for option in ("", ",fusion=false")
    )
    groups = tuple(h.tasks for h in whole.instances[0].htasks)
    padded, _ = arrange(Surrogate(cost, state, "pad"), groups, orchestration=True)
    flushed = [make_instance(state, f"h{i}", [group], [[0]], "chunk") for i, group in enumerate(groups)]
    plans = {
        "TF": unfused,
        "OO": Plan(workload=state.workload, cluster=state.cluster, instances=tuple(flushed)),
        "CA": Plan(workload=state.workload, cluster=state.cluster, instances=(padded,)),
    }
    whole_ns = estimate(whole, cost, seed=0).iteration_ns
    return {part: 1 - whole_ns / estimate(plan, cost, seed=0).iteration_ns for part, plan in plans.items()}
