"""Adapters as subgraphs of their own, launched as one across the single-task hTasks of a bucket (MuxTune §3.4.2, §3.4.3)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.executor.group import require_runnable
from muxtune.policies.base import make_policy
from muxtune.sim.cost.base import Cost, priced_groups
from muxtune.sim.cost.paper import Paper
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import simulate
from muxtune.spec.align import Batch, Row
from muxtune.spec.bind import bind
from muxtune.spec.catalogue import StageContext, Way, stage_subgraphs, subgraph_ops
from muxtune.spec.check import check
from muxtune.spec.clock import LaunchRule, Node, clock_ns, group_node, launch_order
from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.errors import InputError
from muxtune.spec.isolated import isolated_ops, isolated_subgraphs, launched_together
from muxtune.spec.layout import Layout
from muxtune.spec.model import model_preset
from muxtune.spec.ops import Op
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Launch, Plan

WAYS: tuple[Way, Way] = ("forward", "backward")


def names(layout: Layout, stage: int, way: Way) -> list[str]:
    return [s.name for s in isolated_subgraphs(layout, stage, way)]


def test_a_layer_by_hand() -> None:
    """No adapter stands in a subgraph with an all-reduce, forward or backward."""
    layout = Layout(tp=2, pp=3, layers_per_stage=(1, 1, 1))
    assert names(layout, 1, "forward") == [
        *("layer1.norm1", "layer1.attention.qkv adapters", "layer1.attention.2", "layer1.attention.proj adapters"),
        *("layer1.attention.4", "layer1.attention all_reduce"),
        *("layer1.norm2", "layer1.mlp.fc1 adapters", "layer1.mlp.2", "layer1.mlp.fc2 adapters"),
        *("layer1.mlp.4", "layer1.mlp all_reduce", "exit"),
    ]
    assert names(layout, 1, "backward") == [
        *("exit", "layer1.mlp.fc2 adapters", "layer1.mlp.2", "layer1.mlp.fc1 adapters", "layer1.mlp"),
        *("layer1.mlp all_reduce", "layer1.norm2"),
        *("layer1.attention.proj adapters", "layer1.attention.2", "layer1.attention.qkv adapters", "layer1.attention"),
        *("layer1.attention all_reduce", "layer1.norm1"),
    ]


def context(tp: int, stage: int, targets: tuple[str, ...], recompute: Any = "none", sp: bool = False) -> StageContext:
    return StageContext(
        model=replace(model_preset("tiny-llama"), kv_heads=2),
        layout=Layout(tp=tp, pp=3, layers_per_stage=(1, 2, 1), recompute=recompute, sequence_parallel=sp),
        stage=stage,
        adapters=(("a", LoRA(targets=targets)),),
    )


def batch(htask: int = 0) -> Batch:
    row = Row(task="a", slot=0, sample=0, prompt_tokens=15, response_tokens=1, length_tokens=16)
    return Batch(htask=htask, rows=(row,))


@given(
    tp=st.sampled_from((1, 2)),
    stage=st.integers(0, 2),
    targets=st.sampled_from((("qkv",), ("proj",), ("fc1", "fc2"), ("qkv", "proj", "fc1", "fc2"))),
    recompute=st.sampled_from(("none", "full")),
    way=st.sampled_from(WAYS),
)
def test_the_same_operators_cut_otherwise(tp: int, stage: int, targets: Any, recompute: Any, way: Any) -> None:
    found = context(tp, stage, targets, recompute)
    subgraphs, groups = isolated_subgraphs(found.layout, stage, way), isolated_ops(found, batch(), way)
    whole = subgraph_ops(found, batch(), way)
    assert Counter(op for group in groups for op in group) == Counter(op for group in whole for op in group)
    for subgraph, group in zip(subgraphs, groups, strict=True):
        assert {op.family == "lora" for op in group} <= {bool(subgraph.adapters)}
    # The collectives are where they were: after the same compute.
    cuts = [s.name for s in subgraphs if s.collective]
    assert cuts == [s.name for s in stage_subgraphs(found.layout, stage, way) if s.collective]


def test_mode_paper_runs_the_forward_s_operators() -> None:
    found = context(1, 0, ("qkv", "fc2"))
    forward, backward = (priced_groups(Paper(), found, batch(), way, True) for way in WAYS)
    assert Counter(op for g in forward for op in g) == Counter(op for g in backward for op in g)


def test_neighbouring_launches_of_one_base_op_run_as_one() -> None:
    layout = Layout(pp=1, layers_per_stage=(1,))
    subgraphs = isolated_subgraphs(layout, 0, "forward")
    adapters = next(s.index for s in subgraphs if s.adapters)
    launches = [
        Launch(htask=h, subgraph=i, stream="compute") for h, i in ((0, 0), (1, 0), (0, adapters), (1, adapters))
    ]
    found = [
        [x.htask for x in run]
        for run in launched_together([*launches, replace(launches[0], subgraph=adapters + 1)], subgraphs)
    ]
    assert found == [[0], [1], [0, 1], [0]]


def test_a_group_of_nodes_by_hand() -> None:
    """Two adapters of 100 ns at half of the device: 5 once and 2 · 50, not below the slower one; both chains go on then."""
    adapters = Node(compute_ns=105, shared_ns=210, adapters=True, adds_ns=50, once_ns=5)
    assert (group_node([adapters] * 2).compute_ns, group_node([adapters] * 3).compute_ns) == (105, 155)
    assert group_node([adapters] * 3).shared_ns == 310
    chains = [
        (Node(compute_ns=10), adapters, Node(compute_ns=20)),
        (Node(compute_ns=40), adapters, Node(compute_ns=30)),
    ]
    for rule in (LaunchRule(), LaunchRule(ties="earlier"), LaunchRule(priority="critical-path")):
        order = launch_order(chains, rule)
        assert sorted(order) == [(c, d) for c in (0, 1) for d in range(3)]
        assert clock_ns(chains, order) == 10 + 40 + 105 + 20 + 30


@dataclass(frozen=True)
class Halves:
    """Adapters take 100 ns at half of the device, collectives 300, all else 40."""

    model_id: str = "halves"
    calibrated: bool = True

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        if op.family in ("launch", "instruction", "send", "recv", "adamw"):
            return Cost(p50_ns=0)
        return Cost(p50_ns=100, utilisation=0.5) if op.family == "lora" else Cost(p50_ns=40)

    def link_latency(self, op: Op, link: Any) -> Cost:
        return Cost(p50_ns=300 if op.family == "all_reduce" else 0)


def plans(tiny_state: Any, workload: Any, cost: Any, **changes: Any) -> list[Plan]:
    """One bucket of single-task hTasks, adapters fused inside hTasks only, and across."""
    workload = replace(workload, model=replace(workload.model, kv_heads=2))
    state = tiny_state(workload, **{"cluster": "2xA40-nvlink", **changes})
    made = []
    for fusion in ("htask", "bucket"):
        plan = make_policy(f"muxtune:fusion=false,adapter_fusion={fusion}", cost).plan(state)
        made.append(plan)
    return made


def test_fused_adapters_save_what_they_leave_each_other(tiny_state: Any, tiny_workload: Any) -> None:
    """One GPU, two hTasks in one bucket: each pair of adapters takes 100 ns and not 200."""
    workload = tiny_workload(2, samples=(1,))
    apart, fused = plans(tiny_state, workload, Halves(), cluster="1xA40", microbatches=1)
    assert [b.adapter_fusion for b in fused.instances[0].buckets] == ["bucket"]
    assert check(fused) == ()
    times, spans = [], []
    for plan in (apart, fused):
        timeline = simulate(bind(plan, seed=0), Halves()).timeline
        times.append(sum(s.duration_ns for s in timeline.spans if s.subgraph < 0 and s.op in ("forward", "backward")))
        spans.append(timeline.spans)
    targets = len(workload.tasks[0].peft.targets)
    # Forward and backward of every adapter.
    assert times[0] - times[1] == 2 * workload.model.layers * targets * 100
    grouped = [s for s in spans[1] if "adapters" in s.op]
    assert len(grouped) == 2 * workload.model.layers * 4
    assert all(set(s.tasks) == {"t0", "t1"} for s in grouped)


def test_the_ablation_shows_in_numbers(tiny_state: Any, tiny_workload: Any) -> None:
    """Roofline, two GPUs under tp: what fusing across hTasks gains or costs is a figure, whatever its sign."""
    found = plans(tiny_state, tiny_workload(4, samples=(2,)), Roofline(), tp=2, microbatches=2)
    assert {b.adapter_fusion for i in found[1].instances for b in i.buckets if len(b.htasks) > 1} == {"bucket"}
    times = [simulate(bind(plan, seed=0), Roofline()).timeline.makespan_ns for plan in found]
    assert times[0] != times[1]


def test_what_is_refused(tiny_state: Any, tiny_workload: Any) -> None:
    _, fused = plans(tiny_state, tiny_workload(2), Halves(), tp=2)
    (instance,) = fused.instances
    with pytest.raises(InputError, match="adapter_fusion `bucket`: the executor launches adapters with their hTask"):
        require_runnable(fused)
    both = replace(instance.htasks[0], tasks=instance.tasks)
    wrong = replace(fused, instances=(replace(instance, htasks=(both, instance.htasks[1])),))
    assert any("only hTasks of a single task share adapter launches" in p for p in check(wrong))
    with pytest.raises(InputError, match="adapter_fusion='x': known are"):
        make_policy("muxtune:adapter_fusion=x", Roofline())
