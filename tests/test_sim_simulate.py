"""From a Plan to a Timeline and an Estimate: determinism, spans, memory, tokens, energy, errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muxtune.policies.base import make_policy
from muxtune.policies.build import make_instance
from muxtune.sim.cost.base import Cost
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import estimate, make_evaluate, simulate
from muxtune.sim.stage import StageCache
from muxtune.spec.bind import bind, stage_orders
from muxtune.spec.catalogue import Way, subgraph_ops
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.draw import draw_samples
from muxtune.spec.errors import ExtrapolationError, InputError, PlanError
from muxtune.spec.files import write_noun
from muxtune.spec.memory import rank_peaks, stage_context
from muxtune.spec.metrics import bubble_fraction, exposed_comm_fraction, task_step_ns
from muxtune.spec.noun import digest
from muxtune.spec.ops import Op
from muxtune.spec.plan import Plan, StageOrder

WAYS: tuple[Way, Way] = ("forward", "backward")


@pytest.fixture(scope="module")
def make_plan(tiny_workload: Any, tiny_state: Any) -> Any:
    def make(
        groups: Sequence[Sequence[str]] = (("t0", "t1"), ("t2",), ("t3",)),
        buckets: Sequence[Sequence[int]] = ((0,), (1, 2)),
        *,
        alignment: Any = "pad",
        tp: int = 1,
        pp: int = 2,
        cluster: str = "4xcpu",
        model: str = "tiny-llama",
    ) -> Plan:
        workload = tiny_workload(sum(map(len, groups)), model=model)
        state = tiny_state(workload, tp=tp, pp=pp, microbatches=2, cluster=cluster)
        instance = make_instance(state, "i", groups, buckets, alignment)
        return Plan(workload=workload, cluster=state.cluster, instances=(instance,))

    return make


@pytest.mark.parametrize("alignment", ["pad", "varlen"])
def test_equal_input_gives_equal_bytes(make_plan: Any, alignment: str) -> None:
    plan = make_plan(alignment=alignment)
    first, second = (simulate(bind(plan, seed=3, steps=2), Roofline()) for _ in range(2))
    assert digest(first.timeline) == digest(second.timeline)
    assert digest(first.estimate) == digest(second.estimate)
    assert first.events == second.events > 0


def test_a_stage_is_simulated_once_for_each_shape_and_an_event_is_a_span(make_plan: Any) -> None:
    """Two stages; bucket 0 has two equal units, bucket 1 one of two rows and one of one: 3 shapes of 4 units, both ways."""
    bound, cost = bind(make_plan((("t0",), ("t1",)), ((0,), (1,))), seed=0), Roofline()
    cache = StageCache(cost)
    first, again = (simulate(bound, cost, cache) for _ in range(2))
    assert (first.stages_simulated, first.stages_reused) == (12, 4)
    assert (again.stages_simulated, again.stages_reused) == (0, 16)
    assert digest(first.timeline) == digest(again.timeline)
    assert first.events == len(first.timeline.spans) > 16


def test_another_seed_is_another_timeline_of_the_same_shapes(make_plan: Any) -> None:
    plan = make_plan(alignment="varlen")
    first, second = (simulate(bind(plan, seed=s), Roofline()).timeline for s in (0, 1))
    assert digest(first) != digest(second)
    assert [s.op for s in first.spans] == [s.op for s in second.spans]


def test_timeline_names_the_program_and_every_instruction_of_it(make_plan: Any) -> None:
    bound = bind(make_plan(), seed=5, steps=2)
    timeline = simulate(bound, Roofline()).timeline
    assert timeline.source == "sim"
    assert (timeline.program_digest, timeline.seed, timeline.steps) == (bound.program.digest(), 5, 2)
    for listing in bound.program.ranks:
        spans = timeline.instruction_spans(listing.rank)
        assert [s.index for s in spans] == list(range(len(listing.instructions)))
        assert all(a.end_ns == b.start_ns for a, b in itertools.pairwise(spans)), "a rank waits inside spans"
        assert [s.op.split("_")[0] for s in spans] == [x.op for x in listing.instructions]
        assert [s.key for s in spans] == [x.key for x in listing.instructions]
        assert {s.stream for s in spans if s.op in ("forward", "backward", "step")} == {"compute"}
        assert {s.stream for s in spans if s.op.startswith(("send", "recv"))} == {"p2p"}
    steps = [s for s in timeline.spans if s.op == "step"]
    assert sorted(s.tasks[0] for s in steps) == sorted(2 * 2 * [t.task_id for t in bound.plan.workload.tasks])


def test_subgraph_spans_lie_inside_their_instruction(make_plan: Any) -> None:
    timeline = simulate(bind(make_plan(tp=2, model="tiny-gpt2"), seed=0), Roofline()).timeline
    whole = {(s.rank, s.index): s for s in timeline.spans if s.subgraph < 0}
    inner = [s for s in timeline.spans if s.subgraph >= 0]
    assert {s.stream for s in inner} == {"compute", "comm"}
    for span in inner:
        outer = whole[span.rank, span.index]
        assert outer.op in ("forward", "backward")
        assert outer.start_ns <= span.start_ns <= span.end_ns <= outer.end_ns
        assert set(span.tasks) < set(outer.tasks) or span.tasks == outer.tasks
        assert ("all_reduce" in span.op) == (span.stream == "comm")


def test_memory_samples_peak_where_the_memory_model_says(make_plan: Any) -> None:
    bound = bind(make_plan(), seed=0)
    found = simulate(bound, Roofline())
    peaks = tuple(p.peak_bytes for p in rank_peaks(bound))
    assert found.timeline.peak_bytes == found.estimate.peak_bytes == peaks
    for rank, peak in enumerate(rank_peaks(bound)):
        samples = [s for s in found.timeline.memory if s.rank == rank]
        assert [s.time_ns for s in samples] == sorted(s.time_ns for s in samples)
        assert max(s.in_use_bytes for s in samples) == peak.peak_bytes
        assert samples[0].in_use_bytes == samples[-1].in_use_bytes == peak.static_bytes
        assert (samples[0].time_ns, min(s.time_ns for s in samples)) == (0, 0)


@pytest.mark.parametrize("cluster", ["4xcpu", "4xA40-pcie"])
def test_figures_are_those_of_the_timeline(make_plan: Any, cluster: str) -> None:
    plan = make_plan(tp=2, model="tiny-gpt2", cluster=cluster)
    found = simulate(bind(plan, seed=0), Roofline())
    timeline, figures = found.timeline, found.estimate
    assert figures.iteration_ns == timeline.iteration_ns
    assert figures.bubble_fraction == bubble_fraction(timeline)
    assert figures.exposed_comm_fraction == pytest.approx(exposed_comm_fraction(timeline), rel=1e-12)
    assert figures.exposed_comm_fraction > 0
    assert [(t.task, t.step_ns) for t in figures.per_task] == list(task_step_ns(timeline))
    assert (figures.host_bound_fraction > 0) == (cluster != "4xcpu")
    assert (figures.cost_model, figures.calibrated, figures.draws, figures.spread) == ("roofline", False, 1, 0.0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("cluster", ["4xcpu", "4xA40-pcie"])
def test_padded_estimate_is_one_draw_and_equals_the_simulation(make_plan: Any, steps: int, cluster: str) -> None:
    plan = make_plan(tp=2, model="tiny-gpt2", cluster=cluster)
    quick = estimate(plan, Roofline(), seed=7, draws=8, steps=steps)
    assert quick == simulate(bind(plan, seed=7, steps=steps), Roofline()).estimate
    assert quick.draws == 1


def test_varlen_estimate_is_the_mean_over_the_draws_that_would_be_executed(make_plan: Any) -> None:
    plan = make_plan(alignment="varlen")
    found = estimate(plan, Roofline(), seed=7, draws=4)
    each = [simulate(bind(plan, seed=7, steps=1, first_step=d), Roofline()).estimate for d in range(4)]
    times = [e.iteration_ns for e in each]
    assert found.draws == 4
    assert found.iteration_ns == round(statistics.fmean(times))
    assert found.spread == pytest.approx(statistics.stdev(times) / statistics.fmean(times))
    assert found.spread > 0
    assert found.raw_tokens == round(statistics.fmean(e.raw_tokens for e in each))
    assert found.processed_tokens == found.raw_tokens < found.billed_tokens
    assert found.peak_bytes == tuple(max(e.peak_bytes[r] for e in each) for r in range(2))
    assert found.energy_j == pytest.approx(statistics.fmean(e.energy_j or 0.0 for e in each))


def test_tokens_by_hand(make_plan: Any) -> None:
    plan = make_plan()
    found = estimate(plan, Roofline(), seed=0, steps=2)
    tasks = {t.task_id: t for t in plan.workload.tasks}
    billed = sum(t.billed_len_tokens * t.global_batch_samples for t in tasks.values())
    longest = max(tasks["t0"].billed_len_tokens, tasks["t1"].billed_len_tokens)
    together = longest * (tasks["t0"].global_batch_samples + tasks["t1"].global_batch_samples)
    alone = sum(tasks[t].billed_len_tokens * tasks[t].global_batch_samples for t in ("t2", "t3"))
    drawn = sum(
        s.prompt_tokens + s.response_tokens for e in draw_samples(plan.workload, 0, 2).entries for s in e.samples
    )
    assert found.billed_tokens == billed
    assert found.processed_tokens == together + alone
    assert found.raw_tokens + found.truncated_tokens == pytest.approx(drawn / 2, abs=1)


def test_truncated_tokens_are_those_that_the_billed_length_cut(make_plan: Any) -> None:
    plan = make_plan()
    short = tuple(dataclasses.replace(t, billed_len_tokens=8) for t in plan.workload.tasks)
    plan = dataclasses.replace(plan, workload=dataclasses.replace(plan.workload, tasks=short))
    found = estimate(plan, Roofline(), seed=0)
    totals = [s.prompt_tokens + s.response_tokens for e in draw_samples(plan.workload, 0, 1).entries for s in e.samples]
    assert found.truncated_tokens == int(np.maximum(np.array(totals) - 8, 0).sum()) > 0
    assert found.raw_tokens == int(np.minimum(totals, 8).sum())


class Flat:
    """Every operator takes 10 ns, half of it sure, and 1 J above idle; messages are free."""

    model_id, calibrated = "flat", True

    def __init__(self, joules: float = 1.0, extrapolated: str = "") -> None:
        self.joules, self.extrapolated = joules, extrapolated

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        if op.dtype in ("host", "bytes"):
            return Cost(p50_ns=0)
        return Cost(p50_ns=10, relative_error=0.5, joules=self.joules, extrapolated=op.family == self.extrapolated)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=0)


def operators(plan: Plan) -> dict[str, int]:
    """How many operators of each family a Program on one rank runs, by the operator catalogue."""
    bound = bind(plan, seed=0)
    context = stage_context(plan, 0, 0)
    seen = Counter(x.op for x in bound.program.ranks[0].instructions)
    ops = (
        op.family
        for work in bound.program.units
        for batch in work.batches
        for way in WAYS
        for group in subgraph_ops(context, batch, way)
        for op in group
    )
    return {**Counter(ops), "adamw": seen["step"]}


def test_energy_is_operators_above_idle_and_idle_watts_all_the_time(make_plan: Any) -> None:
    plan = make_plan((("t0",),), ((0,),), pp=1)
    found = simulate(bind(plan, seed=0), Flat())
    idle_w = plan.cluster.device.idle_w
    busy_ns = found.timeline.makespan_ns
    total = sum(operators(plan).values())
    assert busy_ns == 10 * total
    assert found.estimate.energy_j == pytest.approx(total * 1.0 + idle_w * busy_ns / 1e9)
    assert simulate(bind(plan, seed=0), Flat(joules=0.0)).estimate.energy_j is None


def test_extrapolated_share_and_error_of_predicted_time(make_plan: Any) -> None:
    plan = make_plan((("t0",),), ((0,),), pp=1)
    seen = operators(plan)
    found = simulate(bind(plan, seed=0), Flat(extrapolated="linear")).estimate
    total = sum(seen.values())
    assert found.extrapolated_fraction == pytest.approx(seen["linear"] / total)
    # Within a family errors add (0.5 of its time), families combine as the root of squares.
    shares = [n / total for n in seen.values()]
    assert found.relative_error == pytest.approx(0.5 * sum(s * s for s in shares) ** 0.5)


def test_steps_are_rounded_up_to_whole_passes_of_an_explicit_order(make_plan: Any) -> None:
    plan = make_plan((("t0",), ("t1",)), ((0,), (1,)))
    twice = []
    for order in stage_orders(plan.instances[0]):
        actions = tuple(dataclasses.replace(a, step=s) for s in (0, 1) for a in order.actions)
        twice.append(StageOrder(stage=order.stage, actions=actions))
    instance = dataclasses.replace(plan.instances[0], order="explicit", orders=tuple(twice), steps=2)
    explicit = dataclasses.replace(plan, instances=(instance,))
    assert estimate(explicit, Roofline(), seed=0, steps=1) == estimate(plan, Roofline(), seed=0, steps=2)
    assert estimate(explicit, Roofline(), seed=0, steps=3) == estimate(plan, Roofline(), seed=0, steps=4)


def test_instances_on_other_devices_run_in_parallel(make_plan: Any, tiny_state: Any) -> None:
    plan = make_plan((("t0",), ("t1",)), ((0,), (1,)))
    state = tiny_state(plan.workload, pp=2, microbatches=2)
    first, second = (make_instance(state, t, [[t]], [[0]]) for t in ("t0", "t1"))
    apart = dataclasses.replace(plan, instances=(first, dataclasses.replace(second, devices=(2, 3))))
    alone = [estimate(dataclasses.replace(plan, instances=(i,)), Roofline(), seed=0) for i in (first, second)]
    together = estimate(apart, Roofline(), seed=0)
    assert together.iteration_ns == max(e.iteration_ns for e in alone)
    assert len(together.peak_bytes) == 4


def test_evaluate_refuses_what_check_refuses(make_plan: Any) -> None:
    evaluate = make_evaluate(Roofline(), seed=0)
    plan = make_plan()
    assert evaluate(plan) == evaluate(plan) == estimate(plan, Roofline(), seed=0)
    device = dataclasses.replace(plan.cluster.device, memory_bytes=10**6)
    small = dataclasses.replace(plan, cluster=dataclasses.replace(plan.cluster, device=device))
    with pytest.raises(PlanError, match="rank 0 does not fit"):
        evaluate(small)


def test_a_deadlock_is_an_error_not_a_short_run(make_plan: Any) -> None:
    plan = make_plan((("t0",), ("t1",)), ((0,), (1,)))
    orders = list(stage_orders(plan.instances[0]))
    steps = [a for a in orders[1].actions if a.op == "step"]
    work = [a for a in orders[1].actions if a.op != "step"]
    orders[1] = StageOrder(stage=1, actions=(*work, *reversed(steps)))
    instance = dataclasses.replace(plan.instances[0], order="explicit", orders=tuple(orders))
    stuck = dataclasses.replace(plan, instances=(instance,))
    for run in (lambda: estimate(stuck, Roofline(), seed=0), lambda: simulate(bind(stuck, seed=0), Roofline())):
        with pytest.raises(PlanError, match="the order deadlocks: rank 0 at instruction"):
            run()


def test_refusals_of_the_cost_model_reach_the_caller(make_plan: Any) -> None:
    class Refusing(Flat):
        def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
            raise ExtrapolationError("out of range")

    with pytest.raises(ExtrapolationError, match="out of range"):
        estimate(make_plan(), Refusing(), seed=0)


def test_at_least_one_draw(make_plan: Any) -> None:
    with pytest.raises(InputError, match="draws=0: must be at least 1"):
        estimate(make_plan(), Roofline(), seed=0, draws=0)


def test_two_processes_simulate_the_same_bytes(tmp_path: Path, tiny_state: Any, tiny_workload: Any) -> None:
    """Whatever order sets have: timeline and Program digests of one plan are equal under two hash seeds."""
    path = tmp_path / "plan.json"
    write_noun(make_policy("muxtune", Roofline()).plan(tiny_state(tiny_workload(3), pp=2)), path)
    found = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "muxtune.experiments.main", "simulate", str(path), "--json"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        body = json.loads(ran.stdout)
        found.append((body["timeline_digest"], body["program_digest"], body["iteration_ns"]))
    assert found[0] == found[1]
