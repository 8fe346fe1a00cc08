"""What a cost model remembers between plans changes no answer: equal plans whether it is new, has planned others, or is full."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.stage_latency import DIRECTIONS
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost._frequency import AtFrequency
from muxtune.sim.cost._memory import Kept, Memory
from muxtune.sim.cost.base import memory_of
from muxtune.sim.cost.paper import Paper
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.frequency import frequency_step
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

DATASETS = ("sst2", "openbookqa", "rte")


def state(tasks: int, shift: int, cluster: str = "4xA40-pcie", tp: int = 2, model: str = "llama2-7b") -> SystemState:
    """Tasks of equal names whose adapters and data sets are shifted against each other."""
    tables = tuple(embedded_length(d) for d in DATASETS)
    made = tuple(
        Task(
            task_id=f"t{i}",
            peft=LoRA(rank=8 << (i + shift) % 3, targets=("qkv",) if (i + shift) % 2 else ("proj", "fc1")),
            dataset=DATASETS[(i + shift) % 3],
            billed_len_tokens=tables[(i + shift) % 3].covered_length(),
            global_batch_samples=4 + 4 * ((i + shift) % 2),
        )
        for i in range(tasks)
    )
    workload = Workload(name="memory", model=model_preset(model), datasets=tables, tasks=made)
    layout = even_layout(workload.model, tp=tp, pp=4 // tp)
    return SystemState(workload=workload, cluster=parse_cluster(cluster), layout=layout, microbatches=4)


STATES = (state(5, 0), state(5, 1), state(4, 2, "4xH200"), state(4, 1, tp=1), state(4, 2, tp=1, model="gpt3-2.7b"))


@pytest.mark.parametrize(
    "policy",
    ["muxtune", "muxtune:alignment=chunk", "muxtune:alignment=varlen,charge=exact", "muxtune:adapter_fusion=bucket"],
)
def test_plans_do_not_depend_on_what_was_planned_before(policy: str) -> None:
    alone = [make_policy(policy, Roofline()).plan(s) for s in STATES]
    busy = make_policy(policy, Roofline())
    assert [busy.plan(s) for s in STATES] == alone
    assert [busy.plan(s) for s in reversed(STATES)] == alone[::-1]


def test_a_full_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [make_policy("muxtune", Roofline()).plan(s) for s in STATES[:2]]
    for module in ("stage_latency", "surrogate"):
        monkeypatch.setattr(f"muxtune.policies.{module}.KEPT", 2)
    monkeypatch.setattr("muxtune.policies.stage_latency.KEPT_CHAINS", 1)
    policy = make_policy("muxtune", Roofline())
    assert [policy.plan(s) for s in (*STATES[:2], *STATES[:2])] == alone * 2


def test_tasks_of_equal_names_in_two_workloads_are_not_mixed_up() -> None:
    cost = Roofline()
    for alignment in ("pad", "varlen", "chunk"):
        for each in STATES:
            seen, new = Surrogate(cost, each, alignment), Surrogate(Roofline(), each, alignment)
            for tasks in (("t0",), ("t1", "t3"), tuple(f"t{i}" for i in range(4))):
                assert seen.microbatch(tasks) == new.microbatch(tasks)
                for way in DIRECTIONS:
                    for isolated in (False, True):
                        chains = [s.latency.chain(0, s.shape(tasks), way, isolated) for s in (seen, new)]
                        assert chains[0] == chains[1]


def test_each_cost_model_has_a_memory_of_its_own() -> None:
    base = Roofline()
    device = parse_cluster("4xA40").device
    wrapped = AtFrequency(base, frequency_step(device, device.frequency_mhz[0]))
    owners = (base, Roofline(), Paper(base), wrapped)
    assert len({id(memory_of(c)) for c in owners}) == len(owners)
    assert all(memory_of(c) is memory_of(c) for c in owners)


def test_a_memory_is_bounded_and_stays_at_home() -> None:
    kept = Kept(3)
    for i in range(10):
        kept[i] = i
        assert kept[i] == i
        assert len(kept) <= 3
    memory = Memory()
    memory.table(5, "here", 1)["a"] = 1
    assert memory.table(5, "here", 1) == {"a": 1}
    assert memory.table(5, "here", 2) == {}
    assert pickle.loads(pickle.dumps(memory)).table(5, "here", 1) == {}


def test_a_device_of_the_same_name_and_other_figures_has_its_own_prices() -> None:
    cost, each = Roofline(), STATES[0]
    slow = replace(each.cluster, device=replace(each.cluster.device, peak_flops_half=10**12))
    first = Surrogate(cost, each, "pad").microbatch(("t0",))
    other = Surrogate(cost, replace(each, cluster=slow), "pad").microbatch(("t0",))
    assert first is not None
    assert other is not None
    assert other.forward_ns > first.forward_ns
