"""Memory over time: peaks by hand, recomputation, baselines, the allocator's rounding, laws on random plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.base import make_policy
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.cluster import device_presets
from muxtune.spec.footprint import Footprint, amount, rounded_bytes
from muxtune.spec.memory import MemoryWalk, moment_text, rank_peaks
from muxtune.spec.plan import Plan
from muxtune.spec.program import Bound
from muxtune.spec.tensors import backbone_bytes, held_bytes, working_bytes
from muxtune.spec.units import MIB


@pytest.fixture
def two_stages(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> Plan:
    """tiny-test, one layer a stage, LoRA rank 4 on qkv, two micro-batches of one 64-token sample, 1F1B."""
    workload = tiny_workload(1, model="tiny-test", datasets=("sst2",), samples=(2,), ranks=(4,), targets=(("qkv",),))
    found: Plan = hand_plan(tiny_state(workload, pp=2), [["t0"]])
    assert workload.tasks[0].billed_len_tokens == 64
    return found


def recomputed(plan: Plan) -> Plan:
    instances = (replace(i, layout=replace(i.layout, recompute="full")) for i in plan.instances)
    return replace(plan, instances=tuple(instances))


#: Elements of one layer: two norms, qkv, proj, fc1 (gate and up), fc2.
LAYER = 2 * 32 + 32 * 64 + 32 * 32 + 32 * 96 + 48 * 32
ADAPTER = 4 * (32 + 64)
#: Elements a token that a layer saves: norms; q, k, v, output, log-sum-exp; qkv's input and A x; gate, up and silu(gate); unfused
#: besides q and k before rope, its cosines and sines for both, a copy of up.
SAVED = 2 * (32 + 1) + (32 + 16 + 16 + 32 + 4) + (32 + 4) + (96 + 48) + (32 + 16 + 4 * 8 + 48)
#: Elements a token of the transient: gradients of gate and up (twice), of the stream (twice).
WORKSPACE = 2 * 96 + 2 * 32
#: Elements a token that final norm and head save.
END = (32 + 1) + 64


def test_first_stage_by_hand(two_stages: Plan) -> None:
    """Two units in flight when the first backward runs, its gradient received."""
    bound = bind(two_stages, seed=0)
    peak = rank_peaks(bound)[0]
    assert peak.footprint == Footprint(
        weights_bytes=4 * (64 * 32 + LAYER),
        adapters_bytes=4 * ADAPTER,
        gradients_bytes=4 * ADAPTER,
        optimizer_states_bytes=8 * ADAPTER,
        activations_bytes=2 * 64 * 4 * SAVED,
        messages_bytes=64 * 4 * 32,
        workspace_bytes=64 * 4 * WORKSPACE,
    )
    assert peak.peak_bytes == peak.footprint.total_bytes == 361_728
    assert moment_text(bound, peak) == "during backward of bucket 0 unit 0, instruction 5"


def test_last_stage_by_hand(two_stages: Plan) -> None:
    """One unit in flight; the received stream is what the layer keeps as its input, so it is counted once."""
    peak = rank_peaks(bind(two_stages, seed=0))[1]
    assert peak.footprint.weights_bytes == 4 * (LAYER + 32 + 64 * 32)
    assert peak.footprint.activations_bytes == 64 * 4 * (SAVED + END)
    assert peak.footprint.messages_bytes == 0
    assert peak.peak_bytes == 257_152


def test_recomputation_by_hand(two_stages: Plan) -> None:
    """A unit keeps its layer's input; the backward has the rest of one layer beside it."""
    first, last = rank_peaks(bind(recomputed(two_stages), seed=0))
    again = 64 * 4 * (SAVED - 32)
    assert first.footprint.activations_bytes == 2 * 64 * 4 * 32 + again
    assert first.peak_bytes == 248_576
    # With one layer and one unit in flight nothing is gained.
    assert last.footprint.activations_bytes == 64 * 4 * (32 + END) + again
    assert last.peak_bytes == 257_152


def test_messages_are_in_use_while_they_are_sent(two_stages: Plan) -> None:
    bound = bind(two_stages, seed=0)
    walk = MemoryWalk(bound, 0)
    instructions = bound.program.ranks[0].instructions
    assert [x.op for x in instructions[:2]] == ["forward", "send"]
    walk.step(instructions[0])
    held = walk.in_use()
    assert walk.step(instructions[1]) == (held + 64 * 4 * 32, held)


def test_time_sliced_backbones(tiny_state: Any, tiny_workload: Any) -> None:
    """hf-peft: every backbone is resident (or one at a time, swapped), but only one task is in flight at a time."""
    plan = make_policy("hf-peft", Roofline()).plan(tiny_state(tiny_workload(3), microbatches=1))
    bound = bind(plan, seed=0)
    walk = MemoryWalk(bound, 0)
    backbone = backbone_bytes(walk.context(0))
    transient = []
    for work in bound.program.units:
        (batch,), context = work.batches, walk.context(work.key.instance)
        transient.append(held_bytes(context, batch) + working_bytes(context, batch))
    (resident,) = rank_peaks(bound)
    (swapped,) = rank_peaks(bind(replace(plan, residency="swapped"), seed=0))
    assert len(set(transient)) == 3
    assert resident.peak_bytes == resident.static_bytes + max(transient)
    assert resident.footprint.weights_bytes == 3 * backbone
    assert swapped.footprint.weights_bytes == backbone
    assert resident.peak_bytes - swapped.peak_bytes == 2 * backbone
    assert resident.footprint.adapters_bytes == swapped.footprint.adapters_bytes


def test_side_by_side_each_rank_holds_its_own(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> None:
    """Two instances on devices 0, 1 and 2, 3: each rank's peak is that of its instance alone."""
    state = tiny_state(tiny_workload(2), pp=2)
    left, right = (hand_plan(state, [[t]]).instances[0] for t in ("t0", "t1"))
    right = replace(right, devices=(2, 3), name="right")
    plan = Plan(workload=state.workload, cluster=state.cluster, instances=(left, right))
    assert check(plan) == ()
    alone = [rank_peaks(bind(replace(plan, instances=(i,)), seed=0)) for i in (left, right)]
    assert rank_peaks(bind(plan, seed=0)) == alone[0] + alone[1]
    assert alone[0][0].footprint.activations_bytes != alone[1][0].footprint.activations_bytes


@pytest.mark.parametrize("device", ["4xcpu", "4xA40"])
@pytest.mark.parametrize("room", [1.0, 1.2, 1.5, 2.0])
def test_what_is_planned_up_to_the_brim_fits(room: float, device: str, tiny_state: Any, tiny_workload: Any) -> None:
    """The planner's bytes (eager order, several hTasks a bucket, recomputation, rounding) never fall short of the walk's."""
    workload = tiny_workload(4)
    for tp in (1, 2):
        free = tiny_state(workload, tp=tp, pp=2, microbatches=4, cluster=device)
        free = replace(free, layout=replace(free.layout, recompute="full"))
        surrogate = Surrogate(Roofline(), free, "pad")
        least = max(surrogate.peak_bytes((t.task_id,), s) for t in workload.tasks for s in range(2))
        spec = replace(free.cluster.device, memory_bytes=round(room * least))
        tight = replace(free, cluster=replace(free.cluster, device=spec))
        plan = make_policy("muxtune", Roofline()).plan(tight)
        assert check(plan) == ()
        assert max(peaks(bind(plan, seed=0))) <= spec.memory_bytes


@pytest.mark.parametrize(
    ("size_bytes", "taken"),
    [
        (1, 512),
        (512, 512),
        (513, 1024),
        (10 * MIB - 1, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
    ],
)
def test_the_allocator_rounds_every_tensor(size_bytes: int, taken: int) -> None:
    assert rounded_bytes(size_bytes, device_presets()["A40"]) == taken
    assert rounded_bytes(size_bytes, device_presets()["cpu"]) == size_bytes
    found = amount([(size_bytes, 3)], device_presets()["H100"])
    assert (found.size_bytes, found.taken_bytes) == (3 * size_bytes, 3 * taken)


def test_rounding_is_a_kind_of_its_own(two_stages: Plan) -> None:
    """On a GPU all kinds stay and the rounding comes on top."""
    gpu = replace(two_stages, cluster=replace(two_stages.cluster, device=device_presets()["A40"]))
    for exact, rounded in zip(*(rank_peaks(bind(p, seed=0)) for p in (two_stages, gpu)), strict=True):
        assert exact.footprint.rounding_bytes == 0 < rounded.footprint.rounding_bytes
        assert replace(rounded.footprint, rounding_bytes=0) == exact.footprint


def test_the_sentence_of_a_footprint() -> None:
    found = Footprint(weights_bytes=3 * 2**30, optimizer_states_bytes=2048)
    assert found.sentence() == "weights 3.00 GiB, optimizer states 2.00 KiB"


@st.composite
def plans(draw: st.DrawFn, state: Any, workload: Any, hand_plan: Any) -> Plan:
    """Any partition of up to four tasks into hTasks and buckets, on any layout and device kind, with either order."""
    tasks = [f"t{i}" for i in range(draw(st.integers(1, 4)))]
    marks = [draw(st.integers(0, len(tasks) - 1)) for _ in tasks]
    groups = [g for g in ([t for t, m in zip(tasks, marks, strict=True) if m == i] for i in range(len(tasks))) if g]
    places = [draw(st.integers(0, len(groups) - 1)) for _ in groups]
    buckets = [b for b in ([h for h, p in enumerate(places) if p == i] for i in range(len(groups))) if b]
    tp = draw(st.sampled_from([1, 2]))
    found = state(
        workload(len(tasks)),
        tp=tp,
        pp=draw(st.sampled_from([1, 2, 4])) // tp or 1,
        microbatches=draw(st.integers(1, 4)),
        cluster=draw(st.sampled_from(["4xcpu", "4xA40"])),
    )
    order, alignment = draw(st.sampled_from(["1f1b", "gpipe"])), draw(st.sampled_from(["pad", "varlen"]))
    plan: Plan = hand_plan(found, groups, buckets, alignment, order=order)
    return recomputed(plan) if draw(st.booleans()) else plan


def peaks(bound: Bound) -> list[int]:
    return [p.peak_bytes for p in rank_peaks(bound)]


class TestLaws:
    """On any plan."""

    @given(st.data())
    def test_memory_returns_to_its_start(
        self, tiny_state: Any, tiny_workload: Any, hand_plan: Any, data: st.DataObject
    ) -> None:
        """Every Program ends with the static bytes; what is in use is the sum of its kinds at every moment."""
        bound = bind(data.draw(plans(tiny_state, tiny_workload, hand_plan)), seed=data.draw(st.integers(0, 3)), steps=2)
        for listing, peak in zip(bound.program.ranks, rank_peaks(bound), strict=True):
            walk, most = MemoryWalk(bound, listing.rank), 0
            for instruction in listing.instructions:
                walk.begin(instruction)
                assert walk.footprint().total_bytes == walk.in_use() >= walk.static_bytes
                most = max(most, walk.in_use())
                walk.end(instruction)
            assert walk.footprint() == walk.static
            assert walk.in_use() == walk.static_bytes
            assert most == peak.peak_bytes == peak.footprint.total_bytes

    @given(st.data())
    def test_recomputation_never_needs_more(
        self, tiny_state: Any, tiny_workload: Any, hand_plan: Any, data: st.DataObject
    ) -> None:
        """Not for a unit in flight, and not at the peak."""
        plan = data.draw(plans(tiny_state, tiny_workload, hand_plan))
        plan = replace(
            plan, instances=tuple(replace(i, layout=replace(i.layout, recompute="none")) for i in plan.instances)
        )
        without, full = bind(plan, seed=0), bind(recomputed(plan), seed=0)
        assert all(a <= b for a, b in zip(peaks(full), peaks(without), strict=True))
        for rank in (x.rank for x in without.program.ranks):
            contexts = [MemoryWalk(b, rank).context(0) for b in (full, without)]
            for batch in (b for work in without.program.units for b in work.batches):
                kept = [held_bytes(c, batch) for c in contexts]
                assert kept[0] < kept[1]

    @given(st.data())
    def test_more_units_in_flight_never_lower_the_peak(
        self, tiny_state: Any, tiny_workload: Any, hand_plan: Any, data: st.DataObject
    ) -> None:
        """GPipe holds at every moment of a stage's work at least the units that 1F1B holds."""
        plan = data.draw(plans(tiny_state, tiny_workload, hand_plan))
        found = [replace(plan, instances=(replace(plan.instances[0], order=o),)) for o in ("1f1b", "gpipe")]  # type: ignore[arg-type]
        few, many = (peaks(bind(p, seed=0)) for p in found)
        assert all(a <= b for a, b in zip(few, many, strict=True))
