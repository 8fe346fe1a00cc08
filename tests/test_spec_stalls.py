"""Stall breakdown: the parts are the makespan of every rank, on any Timeline; cases by hand; figures of whole plans."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muxtune.policies.build import make_instance
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import Simulation, simulate
from muxtune.spec.bind import bind
from muxtune.spec.intervals import length, overlap, union
from muxtune.spec.metrics import bubble_fraction, exposed_comm_fraction
from muxtune.spec.plan import Plan
from muxtune.spec.program import UnitKey
from muxtune.spec.stalls import CAUSES, fractions, rank_times
from muxtune.spec.timeline import Span, Timeline
from muxtune.spec.units import NS_PER_S

OPS = ("forward", "backward", "step", "send_activation", "recv_activation", "recv_gradient", "swap")


def span(op: str, start: int, end: int, rank: int = 0, **more: Any) -> Span:
    key = UnitKey(step=0, instance=0, bucket=0, unit=0)
    fixed = {"rank": rank, "stream": "compute", "op": op, "index": start, "key": key, "tasks": ("a",)}
    return Span(**fixed | {"start_ns": start, "end_ns": end} | more)


def timeline(*spans: Span) -> Timeline:
    return Timeline(source="executor", program_digest="x", seed=0, steps=1, spans=spans)


def parts(found: Timeline, rank: int = 0) -> dict[str, int]:
    """The causes of a rank that are not 0."""
    time = next(t for t in rank_times(found) if t.rank == rank)
    return {cause: part for cause, part in zip(CAUSES, time.parts_ns, strict=True) if part}


SPANS = st.builds(
    lambda op, start, width, rank, index, subgraph, stream, tag, wait: span(
        op, start, start + width, rank, index=index, subgraph=subgraph, stream=stream, tag=tag, host_wait_ns=wait
    ),
    st.sampled_from(OPS),
    st.integers(0, 50),
    st.integers(0, 20),
    st.integers(0, 2),
    st.integers(0, 5),
    st.integers(-1, 1),
    st.sampled_from(("compute", "comm", "p2p")),
    st.one_of(st.none(), st.integers(1, 3)),
    st.integers(0, 30),
)


@given(st.lists(SPANS, min_size=1, max_size=20))
def test_parts_are_the_makespan_whatever_the_spans_say(spans: list[Span]) -> None:
    found = timeline(*spans)
    times = rank_times(found)
    assert tuple(t.rank for t in times) == found.ranks
    for time in times:
        assert min(time.parts_ns) >= 0
        assert sum(time.parts_ns) == found.makespan_ns


INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda x: (x[0], x[0] + x[1])), max_size=8)


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets_of_moments(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    first, second = ({t for start, end in x for t in range(start, end)} for x in (a, b))
    assert length(union(a)) == len(first)
    assert overlap(union(a), union(b)) == len(first & second)


def test_a_receive_is_bubble_until_its_message_is_sent_and_p2p_from_then() -> None:
    found = timeline(
        span("forward", 0, 10),
        span("send_activation", 10, 12, tag=7),
        span("recv_activation", 0, 15, rank=1, tag=7),
        span("forward", 15, 20, rank=1),
    )
    assert parts(found) == {"compute": 10, "p2p_wait": 2, "pipeline_bubble": 8}
    assert parts(found, 1) == {"compute": 5, "p2p_wait": 5, "pipeline_bubble": 10}


def test_a_receive_whose_send_is_not_named_is_unexplained() -> None:
    assert parts(timeline(span("recv_gradient", 0, 4), span("backward", 4, 9))) == {"unexplained": 4, "compute": 5}


def test_a_step_waits_for_the_last_rank() -> None:
    found = timeline(
        span("backward", 0, 4), span("step", 4, 12), span("backward", 0, 9, rank=1), span("step", 9, 12, rank=1)
    )
    assert parts(found) == {"compute": 4, "pipeline_bubble": 5, "optimizer_step": 3}
    assert parts(found, 1) == {"compute": 9, "optimizer_step": 3}
    assert bubble_fraction(found) == pytest.approx(5 / 24)


def test_inside_a_clock_by_hand() -> None:
    # 0-2 host, 2-6 compute (one of it a wait for a kernel), 6-9 a collective alone, 8-10 compute, 10-12 host.
    found = timeline(
        span("forward", 0, 12),
        span("mlp", 2, 6, index=0, subgraph=0, host_wait_ns=1),
        span("mlp all_reduce", 4, 9, index=0, subgraph=1, stream="comm"),
        span("head", 8, 10, index=0, subgraph=2),
    )
    assert parts(found) == {"compute": 5, "exposed_collective": 2, "host_wait": 5}


def test_the_host_stands_between_instructions_and_bubbles_at_the_ends() -> None:
    found = timeline(span("forward", 2, 4), span("backward", 7, 9), span("forward", 0, 10, rank=1))
    assert parts(found) == {"pipeline_bubble": 3, "host_wait": 3, "compute": 4}


GROUPS = st.sampled_from(
    (
        ((("t0", "t1"), ("t2",), ("t3",)), ((0,), (1, 2))),
        ((("t0", "t1", "t2", "t3"),), ((0,),)),
        ((("t0",), ("t1",), ("t2", "t3")), ((0, 1, 2),)),
    )
)


@pytest.fixture(scope="module")
def run_plan(tiny_workload: Any, tiny_state: Any) -> Any:
    """(Plan, Simulation) of four tiny tasks in given groups."""

    def run(
        groups: Any, buckets: Any, tp: int, pp: int, cluster: str, alignment: Any = "pad", seed: int = 0
    ) -> tuple[Plan, Simulation]:
        workload = tiny_workload(4, model="tiny-gpt2")
        state = tiny_state(workload, tp=tp, pp=pp, cluster=cluster)
        instance = make_instance(state, "i", groups, buckets, alignment)
        plan = Plan(workload=workload, cluster=state.cluster, instances=(instance,))
        return plan, simulate(bind(plan, seed=seed, steps=2), Roofline())

    return run


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    GROUPS,
    st.sampled_from(((1, 1), (1, 2), (2, 1), (2, 2))),
    st.sampled_from(("4xcpu", "4xA40-pcie", "4xH100")),
    st.sampled_from(("pad", "varlen")),
    st.integers(0, 3),
)
def test_laws_of_random_programs(
    run_plan: Any, groups: Any, degrees: tuple[int, int], cluster: str, alignment: str, seed: int
) -> None:
    plan, found = run_plan(*groups, *degrees, cluster, alignment, seed)
    times, figures = rank_times(found.timeline), found.estimate
    assert all(sum(t.parts_ns) == found.timeline.makespan_ns for t in times)
    stalls = {s.cause: s.fraction for s in figures.stalls}
    # The closed form of a clock and the subgraph spans of the Timeline say the same.
    assert tuple(stalls.items()) == fractions(times)
    assert stalls["unexplained"] == 0
    assert figures.bubble_fraction == pytest.approx(stalls["pipeline_bubble"] + stalls["p2p_wait"], abs=1e-12)
    assert figures.utilisation == pytest.approx(stalls["compute"] + stalls["optimizer_step"], abs=1e-12)
    assert stalls["exposed_collective"] == pytest.approx(exposed_comm_fraction(found.timeline), abs=1e-12)
    assert 0 < figures.mfu <= min(figures.mfu_billed, figures.utilisation)
    check_energy(plan, found)


def check_energy(plan: Plan, found: Simulation) -> None:
    """Energy is power over time; power lies between idle and peak."""
    figures, device = found.estimate, plan.cluster.device
    assert figures.energy_j == pytest.approx(figures.energy_idle_j + figures.energy_dynamic_j)  # type: ignore[operator]
    assert figures.joules_per_billed_token == pytest.approx(figures.energy_j / figures.billed_tokens)  # type: ignore[operator]
    assert all(device.idle_w <= p.watts <= device.peak_w * (1 + 1e-9) for p in found.timeline.power)
    drawn = 0.0
    for rank in found.timeline.ranks:
        samples = [(p.time_ns, p.watts) for p in found.timeline.power if p.rank == rank]
        assert samples[0][0] == 0
        assert samples == sorted(samples, key=lambda s: s[0])
        ends = [t for t, _ in samples[1:]] + [found.timeline.makespan_ns]
        drawn += sum(watts * (end - start) / NS_PER_S for (start, watts), end in zip(samples, ends, strict=True))
    assert drawn == pytest.approx(figures.energy_j * found.timeline.steps)  # type: ignore[operator]
