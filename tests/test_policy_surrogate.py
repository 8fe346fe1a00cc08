"""Surrogate: stage latency equal to the operator sum, memory equal to what `check` walks, and its place among plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.policies.base import make_policy
from muxtune.policies.build import planning_batch
from muxtune.policies.surrogate import Partition, Surrogate, value_ns
from muxtune.sim.cost.base import Cost, stage_latency_ns
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.bind import bind
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.errors import ExtrapolationError, InfeasibleError
from muxtune.spec.layout import Recompute
from muxtune.spec.memory import rank_peaks
from muxtune.spec.ops import Op
from muxtune.spec.peft import peft_kinds

TARGETS = (("qkv", "proj", "fc1", "fc2"), ("fc1",), ("proj", "fc2"), ("qkv",))
PLANNERS = ("muxtune", "muxtune:charge=exact", "muxtune:fusion=false", "greedy", "random")


@dataclass(frozen=True)
class Uneven:
    """Every shape and direction has its own price, nothing is additive, and the host costs something."""

    model_id: str = "uneven"
    calibrated: bool = False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        price = isqrt(op.flops + op.moved_bytes) + len(op.family) + 3 * len(op.direction) + sum(op.size)
        return Cost(p50_ns=price * (3 if share else 2) // 2, host_ns=7, utilisation=0.2 + price % 7 / 10)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=1)


@dataclass(frozen=True)
class Narrow(Uneven):
    """Refuses more than `most` tokens in a linear."""

    most: int = 0

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        if op.family == "linear" and op.size[0] > self.most:
            raise ExtrapolationError(f"{op.size[0]} tokens")
        return super().latency(op, device, share)


@given(
    model=st.sampled_from(["tiny-llama", "tiny-gpt2"]),
    shape=st.sampled_from([(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)]),
    alignment=st.sampled_from(["pad", "varlen"]),
    cluster=st.sampled_from(["4xcpu", "4xA40"]),
    microbatches=st.integers(1, 4),
    picks=st.permutations(range(6)),
    size=st.integers(1, 6),
)
def test_latency_equals_the_sum_over_operators(
    model: str,
    shape: Any,
    alignment: Any,
    cluster: str,
    microbatches: int,
    picks: Any,
    size: int,
    tiny_state: Any,
    tiny_workload: Any,
) -> None:
    workload = tiny_workload(6, model=model, targets=TARGETS, samples=(1, 2, 5))
    state = tiny_state(workload, tp=shape[0], pp=shape[1], microbatches=microbatches, cluster=cluster)
    surrogate = Surrogate(Uneven(), state, alignment)
    tasks = tuple(f"t{i}" for i in picks[:size])
    batch = planning_batch(workload, tasks, microbatches, alignment)
    found = surrogate.microbatch(tasks)
    assert found is not None
    for stage, context in enumerate(surrogate.contexts):
        for direction, mine in (("forward", found.forward_ns), ("backward", found.backward_ns)):
            link = state.cluster.slowest_link(range(shape[0])) if shape[0] > 1 else None
            cost, device = Uneven(), state.cluster.device
            assert mine[stage] == stage_latency_ns(cost, device, context, batch, direction, link)  # type: ignore[arg-type]


@given(
    data=st.data(),
    tp=st.sampled_from([1, 2]),
    cluster=st.sampled_from(["4xcpu", "4xA40"]),
    recompute=st.sampled_from(["none", "full"]),
)
@settings(max_examples=40)
def test_latency_equals_the_sum_over_operators_of_mixed_methods(
    data: st.DataObject, tp: int, cluster: str, recompute: Recompute, tiny_state: Any, tiny_workload: Any
) -> None:
    """Every PEFT method in any mix, in any order: grouped by method, fed and feeding sides, sums over tp."""
    kinds = data.draw(st.lists(st.sampled_from(sorted(peft_kinds())), min_size=1, max_size=5))
    targets = [data.draw(st.sampled_from(TARGETS)) for _ in kinds]
    base = tiny_workload(len(kinds), samples=(1, 2))
    pefts = [peft_kinds()[kind](targets=t) for kind, t in zip(kinds, targets, strict=True)]  # type: ignore[call-arg]
    tasks = tuple(replace(t, peft=p) for t, p in zip(base.tasks, pefts, strict=True))
    state = tiny_state(replace(base, tasks=tasks), tp=tp, pp=2, cluster=cluster)
    state = replace(state, layout=replace(state.layout, recompute=recompute))
    surrogate = Surrogate(Uneven(), state, "pad")
    names = tuple(t.task_id for t in tasks)
    batch = planning_batch(state.workload, names, 2, "pad")
    found = surrogate.microbatch(names)
    assert found is not None
    link = state.cluster.slowest_link(range(tp)) if tp > 1 else None
    for stage, context in enumerate(surrogate.contexts):
        for direction, mine in (("forward", found.forward_ns), ("backward", found.backward_ns)):
            device = state.cluster.device
            assert mine[stage] == stage_latency_ns(Uneven(), device, context, batch, direction, link)  # type: ignore[arg-type]


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_warm_up_and_steady_phase(pp: int, tiny_state: Any) -> None:
    """2·Σ_{s<S} L^s leaves the last stage out; 2C·max_s L^s."""
    surrogate = Surrogate(Uneven(), tiny_state(pp=pp, microbatches=3), "pad")
    cost = surrogate.microbatch(("t0", "t2"))
    assert cost is not None
    pairs = [f + b for f, b in zip(cost.forward_ns, cost.backward_ns, strict=True)]
    assert surrogate.warmup_ns(("t0", "t2")) == sum(pairs) - pairs[-1]
    assert surrogate.steady_ns(("t0", "t2")) == 3 * max(pairs)
    assert surrogate.first_stage_ns(("t0", "t2")) == pairs[0]


def test_later_microbatches_hold_what_is_left(tiny_state: Any, tiny_workload: Any) -> None:
    # Samples 5 and 2 over C=4: micro-batches of (2, 1), (1, 1), (1), (1) samples.
    surrogate = Surrogate(Uneven(), tiny_state(tiny_workload(2, samples=(5, 2)), microbatches=4), "pad")
    counts = [[(t, n) for t, n, _ in surrogate.shape(("t0", "t1"), c).parts] for c in range(4)]
    assert counts == [[("t0", 2), ("t1", 1)], [("t0", 1), ("t1", 1)], [("t0", 1)], [("t0", 1)]]
    assert surrogate.microbatch(("t1",), 2) is None


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 8])
@pytest.mark.parametrize("cluster", ["4xcpu", "4xA40"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peak_is_what_check_finds(
    pp: int, microbatches: int, cluster: str, recompute: Recompute, tiny_state: Any, tiny_workload: Any
) -> None:
    workload = tiny_workload(3, samples=(8,), targets=TARGETS)
    state = tiny_state(workload, pp=pp, microbatches=microbatches, cluster=cluster)
    state = replace(state, layout=replace(state.layout, recompute=recompute))
    surrogate = Surrogate(Roofline(), state, "pad")
    plan = make_policy("sl-peft", Roofline()).plan(state)
    walked = [p.peak_bytes for p in rank_peaks(bind(plan, seed=0))]
    assert [surrogate.peak_bytes(("t0", "t1", "t2"), s) for s in range(pp)] == walked


def test_varlen_memory_covers_every_draw(tiny_state: Any) -> None:
    state = tiny_state(pp=2)
    surrogate = Surrogate(Roofline(), state, "varlen")
    plan = make_policy("muxtune:alignment=varlen,orchestration=false", Roofline()).plan(state)
    worst = [max(surrogate.peak_bytes(h.tasks, s) for h in plan.instances[0].htasks) for s in range(2)]
    for seed in range(5):
        assert all(p.peak_bytes <= worst[p.rank] for p in rank_peaks(bind(plan, seed=seed)))


def test_htasks_that_do_not_fit_are_not_fused(tiny_state: Any, tiny_workload: Any, fake_cost: Any) -> None:
    """A constant price makes fusing everything best; memory for three tasks forbids it."""
    workload = tiny_workload(6, datasets=("sst2",), samples=(2,), ranks=(4,))
    free = Surrogate(fake_cost(), tiny_state(workload, pp=2), "pad")
    everyone = free.sorted_tasks()
    room = max(free.peak_bytes(everyone[:3], s) for s in range(2))
    plans = []
    for memory_bytes in (None, room):
        state = tiny_state(workload, pp=2, memory_bytes=memory_bytes)
        plans.append(make_policy("muxtune:charge=exact", fake_cost()).plan(state))
    assert [[len(h.tasks) for h in p.instances[0].htasks] for p in plans] == [[6], [3, 3]]


def test_a_task_too_big_alone_is_named(tiny_state: Any, fake_cost: Any) -> None:
    with pytest.raises(
        InfeasibleError,
        match=r"task t0 does not fit as an hTask of its own: rank 0 needs 17\.5 MiB .* cpu has 8\.00 MiB",
    ):
        make_policy("greedy", fake_cost()).plan(tiny_state(memory_bytes=8 * 2**20))


def test_groups_outside_the_cost_model_are_not_fused(tiny_state: Any, tiny_workload: Any) -> None:
    state = tiny_state(tiny_workload(3, datasets=("sst2",), samples=(2,)), microbatches=1)
    inside = Surrogate(Narrow(most=256), state, "pad")
    assert inside.admits(("t0", "t1"))
    assert not inside.admits(("t0", "t1", "t2"))
    with pytest.raises(ExtrapolationError):
        make_policy("muxtune", Narrow(most=64)).plan(state)


def set_partitions(tasks: tuple[str, ...]) -> Iterator[Partition]:
    """Every partition of the tasks; members keep the order of `tasks`."""
    if not tasks:
        yield ()
        return
    *rest, last = tasks
    for smaller in set_partitions(tuple(rest)):
        yield (*smaller, (last,))
        for i in range(len(smaller)):
            yield (*smaller[:i], (*smaller[i], last), *smaller[i + 1 :])


@pytest.mark.parametrize("fixed_ns", [0, 10, 1000, 100_000])
def test_no_planner_beats_brute_force(
    fixed_ns: int, tiny_state: Any, tiny_workload: Any, fake_cost: Callable[..., Any]
) -> None:
    cost = fake_cost(fixed_ns=fixed_ns, flops_per_ns=60)
    state = tiny_state(tiny_workload(6), pp=2, microbatches=2)
    surrogate = Surrogate(cost, state, "pad")
    best = min(value_ns(surrogate, p) for p in set_partitions(surrogate.sorted_tasks()))
    value = {}
    for reference in PLANNERS:
        solver = make_policy(reference, cost).plan(state).made_by.solver
        assert solver is not None
        assert solver.value_ns is not None
        value[reference] = solver.value_ns
    assert min(value.values()) >= best
    assert value["muxtune:charge=exact"] <= min(value["muxtune"], value["muxtune:fusion=false"])
    assert value["greedy"] <= value["muxtune:fusion=false"]


def test_random_follows_the_seed(tiny_state: Any, fake_cost: Any) -> None:
    state = tiny_state()
    plans = [make_policy("random", fake_cost()).plan(replace(state, seed=s)) for s in (0, 0, 1, 2, 3, 4)]
    assert plans[0] == plans[1]
    assert len({p.instances[0].htasks for p in plans}) > 1
