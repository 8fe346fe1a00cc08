"""Inside a clock: Algorithm 1 by hand, the two streams, launch lists that hide collectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.policies.base import make_policy
from muxtune.policies.launches import launch_lists, unit_ns
from muxtune.policies.stage_latency import DIRECTIONS
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.base import Cost
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.recurrence import recur_blocks
from muxtune.sim.simulate import estimate
from muxtune.sim.stage import Site, stage_run
from muxtune.spec.check import check
from muxtune.spec.clock import LaunchRule, Node, algorithm_1, clock_ns, critical_path, slowed_end_ns
from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.errors import InputError
from muxtune.spec.ops import Op
from muxtune.spec.plan import COMM_CTAS

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


def test_ties_of_algorithm_1_may_go_to_the_earlier_htask() -> None:
    chains = [(node(3), node(9)), (node(5), node(9)), (node(3), node(10))]
    assert algorithm_1(chains, "earlier") == ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1))


def test_critical_path_by_hand() -> None:
    # a has 4+9+2 left, b 1+1+1, c 3+1+3. a first; its collective takes 4-13, so c (4-7), b (7-8). Collectives of c and b
    # wait for it: c 13-14, b 14-15. Nothing is there before a at 13, with c and b to come: a, c, b.
    chains = [(node(4, 9), node(2)), (node(1, 1), node(1)), (node(3, 1), node(3))]
    assert critical_path(chains) == ((0, 0), (2, 0), (1, 0), (0, 1), (2, 1), (1, 1))
    # Algorithm 1 takes the longest of each level: at the second it waits for c before a.
    assert algorithm_1(chains) == ((0, 0), (2, 0), (1, 0), (2, 1), (0, 1), (1, 1))
    assert clock_ns(chains, critical_path(chains)) == 19
    assert clock_ns(chains, algorithm_1(chains)) == 20


@given(CHAINS)
def test_every_rule_launches_each_node_once_and_in_order(chains: Any) -> None:
    for order in (algorithm_1(chains), algorithm_1(chains, "earlier"), critical_path(chains)):
        assert sorted(order) == [(c, d) for c, chain in enumerate(chains) for d in range(len(chain))]
        assert all([d for c, d in order if c == k] == list(range(len(chain))) for k, chain in enumerate(chains))


INTERVALS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5)


@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 60), INTERVALS)
def test_slowed_end_against_a_step_by_step_count(start_ns: int, alone_ns: int, shared_ns: int, gaps: Any) -> None:
    collectives, now_ns = [], 0
    for gap, length in gaps:
        collectives.append((now_ns + gap, now_ns + gap + length))
        now_ns += gap + length
    shared_ns = max(alone_ns, shared_ns)
    left, at_ns = alone_ns * shared_ns, start_ns
    while left > 0:
        left -= alone_ns if any(a <= at_ns < b for a, b in collectives) else shared_ns
        at_ns += 1
    assert slowed_end_ns(start_ns, alone_ns, shared_ns, collectives) == at_ns


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


class NoHost(Roofline):
    """The roofline on a host that costs nothing."""

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return replace(super().latency(op, device, share), host_ns=0)


@pytest.mark.parametrize("priority", ["shallow", "critical-path"])
@pytest.mark.parametrize("ties", ["longest", "earlier"])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_stage_engine_agrees_to_the_nanosecond(priority: Any, ties: Any, tp: int, tiny_state: Any) -> None:
    """A bucket's clock, its adapters fused and its compute slowed under collectives, is what the planner took it for."""
    rule = LaunchRule(priority=priority, ties=ties)
    state = tiny_state(tp=tp, cluster="4xA40", microbatches=1)
    surrogate = Surrogate(NoHost(), state, "pad", rule=rule)
    groups, htasks = [("t0", "t3"), ("t1",), ("t2",)], (0, 1, 2)
    for listing in launch_lists(surrogate, htasks, groups):
        batches = [
            replace(surrogate.shape(tasks).row_batch(), htask=h) for h, tasks in zip(htasks, groups, strict=True)
        ]
        for comm_ctas in (COMM_CTAS, 0):
            site = Site(
                context=surrogate.contexts[0],
                device=state.cluster.device,
                link=state.cluster.slowest_link(range(tp)),
                comm_ctas=comm_ctas,
            )
            found = stage_run(NoHost(), site, batches, listing.direction, listing.launches, recur_blocks)
            assert (found.slowed_ns > 0) == (comm_ctas > 0)
            if comm_ctas:
                assert found.duration_ns == unit_ns(surrogate, groups, 0, 0, listing.direction)


@pytest.mark.parametrize("options", ["priority=shallow", "priority=critical-path", "ties=earlier"])
def test_priorities_are_options_of_muxtune(options: str, sharded: Any) -> None:
    """Each rule's plan is valid, and no worse than serial execution."""
    serial = make_policy("muxtune:fusion=false,orchestration=false", Roofline()).plan(sharded)
    plan = make_policy(f"muxtune:fusion=false,{options}", Roofline()).plan(sharded)
    assert any(b.launches for b in plan.instances[0].buckets)
    assert options in plan.made_by.config
    assert check(plan) == ()
    assert estimate(plan, Roofline(), seed=0).iteration_ns < estimate(serial, Roofline(), seed=0).iteration_ns


@pytest.mark.parametrize("option", ["priority=deep", "ties=random"])
def test_unknown_priorities_are_named(option: str, sharded: Any) -> None:
    with pytest.raises(InputError, match=r"known are \['"):
        make_policy(f"muxtune:{option}", Roofline()).plan(sharded)
