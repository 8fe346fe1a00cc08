"""Data and sequence parallelism: who computes what, what is summed over which links, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.policies.base import make_policy, policies
from muxtune.sim.cost.base import Cost
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.priced import price
from muxtune.sim.recurrence import recur
from muxtune.sim.simulate import estimate, simulate
from muxtune.sim.stage import StageCache
from muxtune.spec.bind import bind
from muxtune.spec.catalogue import (
    StageContext,
    adapter_sizes,
    replicated_parameters,
    stage_subgraphs,
    subgraph_ops,
)
from muxtune.spec.check import check
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.memory import stage_context
from muxtune.spec.model import model_preset
from muxtune.spec.ops import COLLECTIVES, Op
from muxtune.spec.peft.lora import LoRA


class Sums(Roofline):
    """Collectives cost their bytes in ns, times 1000 between nodes; everything else is free."""

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=0)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=op.size[0] * (1000 if link.kind == "ib" else 1))


def test_ranks_of_a_layout() -> None:
    layout = Layout(tp=2, pp=2, dp=2, layers_per_stage=(1, 1))
    assert [layout.replica_of(r) for r in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [layout.stage_peers(r) for r in (0, 3, 6)] == [(0, 1), (2, 3), (6, 7)]
    assert [layout.replica_peers(r) for r in (0, 3, 6)] == [(0, 4), (3, 7), (2, 6)]


@given(tasks=st.integers(1, 4), dp=st.integers(1, 3), pp=st.integers(1, 2), microbatches=st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_every_unit_is_computed_by_one_replica_on_every_stage(
    tiny_state: Any, tiny_workload: Any, hand_plan: Any, tasks: int, dp: int, pp: int, microbatches: int
) -> None:
    state = tiny_state(tiny_workload(tasks), pp=pp, dp=dp, microbatches=microbatches, cluster="6xcpu")
    plan = hand_plan(state, [[t.task_id] for t in state.workload.tasks])
    assert check(plan) == ()
    program = bind(plan, seed=0).program
    for way in ("forward", "backward"):
        ran = [(x.key, state.layout.stage_of(r.rank)) for r in program.ranks for x in r.instructions if x.op == way]
        assert sorted(ran, key=str) == sorted(((w.key, s) for w in program.units for s in range(pp)), key=str)
    for listing in program.ranks:
        replica = state.layout.replica_of(listing.rank)
        assert {x.key.unit % dp for x in listing.instructions if x.op == "forward"} <= {replica}
        assert [x.task for x in listing.instructions if x.op == "step"] == [t.task_id for t in state.workload.tasks]


@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_engines_agree_under_every_layout(tiny_state: Any, tiny_workload: Any, data: st.DataObject) -> None:
    tp, pp, dp = (data.draw(st.integers(1, 2)) for _ in range(3))
    state = tiny_state(
        tiny_workload(3),
        tp=tp,
        pp=pp,
        dp=dp,
        sequence_parallel=tp > 1 and data.draw(st.booleans()),
        microbatches=data.draw(st.integers(1, 4)),
        cluster=data.draw(st.sampled_from(("8xA40-pcie", "2x4xA40-ib"))),
    )
    plan = make_policy(data.draw(st.sampled_from(sorted(policies()))), Roofline()).plan(state)
    found = simulate(bind(plan, seed=0), Roofline()).estimate
    assert found == replace(estimate(plan, Roofline(), seed=0, draws=1), draws=found.draws)


def test_replicas_of_equal_units_take_as_long_as_one_with_half_of_them(
    tiny_state: Any, tiny_workload: Any, hand_plan: Any
) -> None:
    """C=4 over two replicas is C=2, plus the sum of the adapters' gradients before each of two steps."""
    work = tiny_workload(2, samples=(4,))
    whole = hand_plan(tiny_state(work, pp=2, microbatches=2, cluster="4xA40-pcie"), [["t0"], ["t1"]])
    halves = tiny_workload(2, samples=(8,))
    wide = hand_plan(tiny_state(halves, pp=2, dp=2, microbatches=4, cluster="4xA40-pcie"), [["t0"], ["t1"]])
    cost = Roofline()
    alone = simulate(bind(whole, seed=0), cost).timeline.makespan_ns
    both = simulate(bind(wide, seed=0), cost).timeline.makespan_ns
    link = wide.cluster.link(0, 2)
    sums = []
    for stage in (0, 1):
        context = stage_context(wide, 0, stage)
        sizes = [4 * adapter_sizes(context, t)[0] for t in ("t0", "t1")]
        made = (
            Op(family="all_reduce", direction="forward", dtype="bytes", size=(n,), shape=(2,), flops=0, moved_bytes=n)
            for n in sizes
        )
        sums.append([cost.link_latency(op, link).p50_ns for op in made])
    # Both stages hold two layers: each step ends on the two stages together.
    assert sums[0] == sums[1]
    assert both - alone == sum(sums[0])


def test_gradients_are_summed_over_the_links_between_replicas(
    tiny_state: Any, tiny_workload: Any, hand_plan: Any
) -> None:
    """tp=2 inside each node, dp=2 across: replicated sides and collectives inside, whole gradients between nodes."""
    state = tiny_state(tiny_workload(1), tp=2, dp=2, microbatches=2, cluster="2x2xA40-ib")
    plan = hand_plan(state, [["t0"]])
    cost = Sums()
    priced = price(bind(plan, seed=0), cost, StageCache(cost))
    context = stage_context(plan, 0, 0)
    parameters, replicated = adapter_sizes(context, "t0")[0], replicated_parameters(context, "t0")
    assert 0 < replicated < parameters
    norm_bytes = 4
    for listing in priced.ranks:
        (step,) = (x for x in listing.instructions if x.op == "step")
        assert step.duration_ns == 4 * replicated + 1000 * 4 * parameters + norm_bytes
    recur(priced)


def test_replicated_parameters_by_hand() -> None:
    """tiny-test: hidden 32, ffn 48, 4+2·2 heads of 8; rank 2, tp 2. A (2×32) beside qkv and fc1, B (32×2) beside proj, fc2."""
    model = model_preset("tiny-test")
    context = StageContext(model=model, layout=even_layout(model, tp=2), stage=0, adapters=(("a", LoRA(rank=2)),))
    assert replicated_parameters(context, "a") == 2 * (4 * 2 * 32)
    alone = StageContext(model=model, layout=even_layout(model), stage=0, adapters=(("a", LoRA(rank=2)),))
    assert replicated_parameters(alone, "a") == 0


def contexts(pp: int) -> list[StageContext]:
    """Every stage of tiny-llama at tp=2, without and with sequence parallelism."""
    model = model_preset("tiny-llama")
    return [
        StageContext(
            model=model,
            layout=even_layout(model, tp=2, pp=pp, sequence_parallel=sp),
            stage=stage,
            adapters=(("t0", LoRA(rank=4)),),
        )
        for stage in range(pp)
        for sp in (False, True)
    ]


def test_collectives_of_a_layer_under_sequence_parallelism() -> None:
    layout = even_layout(model_preset("tiny-llama"), tp=2, pp=4, sequence_parallel=True)
    names = [[s.name for s in stage_subgraphs(layout, 1, way) if s.collective] for way in ("forward", "backward")]
    assert names == [
        [
            "layer1.norm1 all_gather",
            "layer1.attention reduce_scatter",
            "layer1.norm2 all_gather",
            "layer1.mlp reduce_scatter",
        ],
        [
            "exit all_gather",
            "layer1.mlp reduce_scatter",
            "layer1.norm2 all_gather",
            "layer1.attention reduce_scatter",
        ],
    ]


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("pp", [1, 2])
def test_sequence_parallelism_moves_as_many_bytes_and_computes_norms_on_a_part(
    tiny_workload: Any, tiny_state: Any, hand_plan: Any, pp: int, way: Any
) -> None:
    """A ring all-reduce is a reduce-scatter and an all-gather (Korthikanti et al. 2022, §4.2.2)."""
    plan = hand_plan(tiny_state(tiny_workload(1), microbatches=1), [["t0"]])
    (batch,) = bind(plan, seed=0).program.units[0].batches
    moved = {True: 0, False: 0}
    norms = {True: 0, False: 0}
    linears: dict[bool, list[Op]] = {True: [], False: []}
    for context in contexts(pp):
        sp = context.layout.sequence_parallel
        for op in (op for group in subgraph_ops(context, batch, way) for op in group):
            if op.family in COLLECTIVES:
                moved[sp] += (2 if op.family == "all_reduce" else 1) * op.size[0]
            elif op.family == "rmsnorm":
                norms[sp] += op.size[0]
            elif op.family in ("linear", "attention", "lora"):
                linears[sp].append(op)
    assert linears[True] == linears[False]
    assert norms[False] == 2 * norms[True]
    size_bytes = batch.tokens * 192 * 4
    # Stages hand on shards: what a stage would have scattered last, or gathered first, is left to its neighbour's side.
    assert abs(moved[True] - moved[False]) <= size_bytes * (pp + 1)


def test_messages_between_stages_are_shards(tiny_workload: Any, tiny_state: Any, hand_plan: Any) -> None:
    sizes = {}
    for sp in (False, True):
        state = tiny_state(tiny_workload(1), tp=2, pp=2, sequence_parallel=sp, cluster="4xA40-pcie")
        program = bind(hand_plan(state, [["t0"]]), seed=0).program
        sizes[sp] = [x.size_bytes for r in program.ranks for x in r.instructions if x.op == "send"]
    assert sizes[False] == [2 * n for n in sizes[True]]


def test_sequence_parallelism_needs_ranks() -> None:
    with pytest.raises(ValueError, match="sequence_parallel with tp=1"):
        Layout(tp=1, pp=1, sequence_parallel=True, layers_per_stage=(1,))
