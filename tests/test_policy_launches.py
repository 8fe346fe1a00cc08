"""Inside a clock: Algorithm 1 by hand, the two streams, launch lists that hide collectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.base import make_policy
from muxtune.policies.launches import algorithm_1, clock_ns, launch_lists, unit_ns
from muxtune.policies.stage_latency import DIRECTIONS, Node
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import estimate
from muxtune.spec.check import check

CHAINS = st.lists(
    st.lists(
        st.builds(Node, compute_ns=st.integers(0, 9), collective=st.just(True), comm_ns=st.integers(0, 9)),
        min_size=1,
        max_size=4,
    ).map(tuple),
    min_size=1,
    max_size=4,
)


def node(compute_ns: int, comm_ns: int | None = None) -> Node:
    return Node(compute_ns=compute_ns, collective=comm_ns is not None, comm_ns=comm_ns or 0)


def test_algorithm_1_by_hand() -> None:
    """Shallow first; among equals the longest; ties to the earlier hTask."""
    chains = [(node(3), node(9)), (node(5), node(9)), (node(3), node(10))]
    assert algorithm_1(chains) == ((1, 0), (0, 0), (2, 0), (2, 1), (0, 1), (1, 1))


def test_clock_by_hand() -> None:
    # a: 4 compute, 3 collective, 2 compute; b: 4, 3, 2. Compute a0 0-4, b0 4-8, a1 8-10, b1 11-13; comm 4-7, 8-11.
    chains = [(node(4, 3), node(2)), (node(4, 3), node(2))]
    assert clock_ns(chains, algorithm_1(chains)) == 13
    # One after the other, every collective exposed: 2·(4+3+2).
    assert clock_ns(chains, [(0, 0), (0, 1), (1, 0), (1, 1)]) == 18
    assert sum(clock_ns([c], [(0, 0), (0, 1)]) for c in chains) == 18


@given(CHAINS)
def test_clock_lies_between_its_bounds(chains: Any) -> None:
    """Not below the busier stream nor the longest chain, not above everything one after the other."""
    found = clock_ns(chains, algorithm_1(chains))
    compute = [sum(n.compute_ns for n in c) for c in chains]
    comm = [sum(n.comm_ns for n in c) for c in chains]
    assert max(sum(compute), sum(comm), *(a + b for a, b in zip(compute, comm, strict=True))) <= found
    assert found <= sum(compute) + sum(comm)


@pytest.fixture
def sharded(tiny_state: Any) -> Any:
    """Four tasks on two tensor-parallel GPUs."""
    return tiny_state(tp=2, cluster="2xA40")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_a_chain_takes_the_stage_s_time(tp: int, pp: int, tiny_state: Any) -> None:
    surrogate = Surrogate(Roofline(), tiny_state(tp=tp, pp=pp, cluster="4xA40"), "pad")
    tasks = ("t2", "t0", "t1")
    for stage in range(pp):
        for direction in DIRECTIONS:
            chain = surrogate.latency.chain(stage, surrogate.shape(tasks), direction)
            alone = surrogate.direction_ns(tasks, 0, stage, direction)
            assert sum(n.compute_ns + n.comm_ns for n in chain) == alone
            assert any(n.collective for n in chain) == (tp > 1)
            assert unit_ns(surrogate, [tasks], 0, stage, direction) == alone


def test_two_htasks_hide_each_other_s_collectives(sharded: Any) -> None:
    surrogate = Surrogate(Roofline(), sharded, "pad")
    groups = [("t1",), ("t2",)]
    for direction in DIRECTIONS:
        alone = sum(unit_ns(surrogate, [g], 0, 0, direction) for g in groups)
        assert unit_ns(surrogate, groups, 0, 0, direction) < alone


def test_nothing_overlaps_on_a_cpu_or_without_collectives(tiny_state: Any) -> None:
    groups = [("t1",), ("t2",)]
    for state in (tiny_state(tp=2), tiny_state(cluster="1xA40")):
        surrogate = Surrogate(Roofline(), state, "pad")
        for direction in DIRECTIONS:
            alone = sum(unit_ns(surrogate, [g], 0, 0, direction) for g in groups)
            assert unit_ns(surrogate, groups, 0, 0, direction) == alone


def test_muxtune_buckets_htasks_to_hide_collectives(sharded: Any, tiny_state: Any) -> None:
    plan = make_policy("muxtune:fusion=false", Roofline()).plan(sharded)
    (instance,) = plan.instances
    assert len(instance.buckets) < len(instance.htasks)
    shared = [b for b in instance.buckets if len(b.htasks) > 1]
    assert all(len(b.launches) == 2 for b in shared)
    assert all(not b.launches for b in instance.buckets if b not in shared)
    assert check(plan) == ()
    (one_stage,) = make_policy("muxtune:fusion=false", Roofline()).plan(tiny_state(cluster="1xA40")).instances
    assert [len(b.htasks) for b in one_stage.buckets] == [1, 1, 1, 1]


def test_launch_lists_are_what_hides_them(sharded: Any) -> None:
    """The simulator sees less exposed communication with the lists than with one hTask after the other."""
    plan = make_policy("muxtune:fusion=false", Roofline()).plan(sharded)
    (instance,) = plan.instances
    serial = replace(
        plan, instances=(replace(instance, buckets=tuple(replace(b, launches=()) for b in instance.buckets)),)
    )
    with_lists, without = (estimate(p, Roofline(), seed=0) for p in (plan, serial))
    assert with_lists.exposed_comm_fraction < without.exposed_comm_fraction
    assert with_lists.iteration_ns < without.iteration_ns


def test_lists_cover_every_stage_and_direction(tiny_state: Any) -> None:
    surrogate = Surrogate(Roofline(), tiny_state(tp=2, pp=2, cluster="4xA40"), "pad")
    lists = list(launch_lists(surrogate, (5, 3), [("t1",), ("t2",)]))
    assert [(x.stage, x.direction) for x in lists] == [(s, d) for s in (0, 1) for d in DIRECTIONS]
    for listing in lists:
        assert {x.htask for x in listing.launches} == {3, 5}
        # Task t2 has the longer micro-batch, so hTask 3 goes first at every depth.
        assert listing.launches[0].htask == 3
