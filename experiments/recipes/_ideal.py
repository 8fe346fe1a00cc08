"""Ideal hardware for laws: a layer takes time in proportion to its tokens, forward and backward alike, all else is free."""

from __future__ import annotations

from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.cost.base import Cost, CostBase
from muxtune.sim.simulate import simulate
from muxtune.spec.bind import bind
from muxtune.spec.cluster import DeviceSpec, Link, parse_cluster
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.ops import Op
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

#: Four layers: one a stage at S=4.
MODEL = model_preset("tiny-llama")
TOKEN_NS = 10


class TokenTime(CostBase):
    """fc2 takes `TOKEN_NS` a token; every other operator, launch and message is free."""

    model_id = "token-time"
    calibrated = False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        """tokens · TOKEN_NS for fc2."""
        timed = op.family == "linear" and op.shape[:2] == MODEL.linear_shape("fc2")
        return Cost(p50_ns=op.size[0] * TOKEN_NS if timed else 0)

    def link_latency(self, op: Op, link: Link) -> Cost:
        """Free."""
        return Cost(p50_ns=0)


def equal_tasks(tasks: int, samples: int) -> Workload:
    """Tasks that differ in their names only."""
    table = embedded_length("sst2")
    made = (
        Task(task_id=f"t{i}", peft=LoRA(), dataset="sst2", billed_len_tokens=64, global_batch_samples=samples)
        for i in range(tasks)
    )
    return Workload(name=f"{tasks} equal tasks", model=MODEL, datasets=(table,), tasks=tuple(made))


def makespan_ns(policy: str, workload: Workload, stages: int, microbatches: int) -> int:
    """Program time of a policy's plan on ideal hardware, by the SimPy engine."""
    cost = TokenTime()
    layout = even_layout(workload.model, pp=stages)
    state = SystemState(
        workload=workload, cluster=parse_cluster(f"{stages}xA40"), layout=layout, microbatches=microbatches
    )
    plan = make_policy(policy, cost).plan(state)
    return simulate(bind(plan, seed=0), cost).timeline.makespan_ns
