"""Across clocks: the laws of pipelines, hand-checked channels, and the closed form against the event queue."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.policies.build import make_instance
from muxtune.sim.cost.base import Cost
from muxtune.sim.pipeline import run_pipeline
from muxtune.sim.priced import Channel, Priced, PricedProgram, PricedRank, RunTimes, alone_ns, price
from muxtune.sim.recurrence import recur, recur_blocks
from muxtune.sim.stage import StageCache
from muxtune.sim.streams import run_blocks
from muxtune.spec.align import ALIGNMENTS, Alignment
from muxtune.spec.bind import bind, stage_orders
from muxtune.spec.check import check
from muxtune.spec.cluster import DeviceSpec, Link, device_presets, parse_cluster
from muxtune.spec.errors import PlanError
from muxtune.spec.ops import Op
from muxtune.spec.order import bucket_major, chunks_of, eager, gpipe, one_f_one_b
from muxtune.spec.plan import Action, Instance, Plan, StageOrder
from muxtune.spec.program import Bound

T_NS = 1000
PAYLOADS = ("activation", "gradient")


def both(priced: PricedProgram) -> RunTimes:
    """Times by the event queue, after they were seen to equal the closed form's."""
    times, events = run_pipeline(priced)
    assert times == recur(priced)
    assert events > 0
    return times


def rank(number: int, *instructions: Priced) -> PricedRank:
    return PricedRank(rank=number, instructions=instructions)


def forward(duration_ns: int) -> Priced:
    return Priced(op="forward", duration_ns=duration_ns)


def backward(duration_ns: int) -> Priced:
    return Priced(op="backward", duration_ns=duration_ns)


def send(channel: int = 0, duration_ns: int = 0) -> Priced:
    return Priced(op="send", duration_ns=duration_ns, channel=channel)


def recv(channel: int = 0, duration_ns: int = 0) -> Priced:
    return Priced(op="recv", duration_ns=duration_ns, channel=channel)


def step(duration_ns: int, meeting: int = 0) -> Priced:
    return Priced(op="step", duration_ns=duration_ns, meeting=meeting)


def channel(*transfers_ns: int, source: int = 0, target: int = 1, payload: Any = "activation") -> Channel:
    return Channel(source=source, target=target, payload=payload, transfers_ns=transfers_ns)


def program(*ranks: PricedRank, channels: tuple[Channel, ...] = (), meetings: tuple[int, ...] = ()) -> PricedProgram:
    return PricedProgram(ranks=ranks, channels=channels, meetings=meetings)


def test_two_stages_with_p2p_by_hand() -> None:
    # forward 10, backward 20, handing over 1, link 5, taking over 2.
    found = both(
        program(
            rank(0, forward(10), send(0, 1), recv(1, 2), backward(20)),
            rank(1, recv(0, 2), forward(10), backward(20), send(1, 1)),
            channels=(channel(5), channel(5, source=1, target=0, payload="gradient")),
        )
    )
    assert found == (
        ((0, 10), (10, 11), (11, 56), (56, 76)),  # its gradient arrives at 49 + 5 = 54
        ((0, 18), (18, 28), (28, 48), (48, 49)),  # the activation arrives at 11 + 5 = 16
    )


def test_a_channel_carries_one_message_at_a_time() -> None:
    # Sent at 10 and 20, each takes 100 on the link: the second starts when the first has arrived.
    found = both(
        program(
            rank(0, forward(10), send(), forward(10), send()),
            rank(1, recv(), recv()),
            channels=(channel(100, 100),),
        )
    )
    assert found[1] == ((0, 110), (110, 210))


def test_opposite_and_different_payload_channels_do_not_wait_for_each_other() -> None:
    found = both(
        program(
            rank(0, send(0), send(1), recv(2)),
            rank(1, send(2), recv(0), recv(1)),
            channels=(
                channel(100),
                channel(100, payload="gradient"),
                channel(100, source=1, target=0),
            ),
        )
    )
    assert found[0][-1] == (0, 100)
    assert found[1] == ((0, 0), (0, 100), (100, 100))


def test_a_receive_is_posted_one_unit_ahead_and_no_more() -> None:
    # Both messages are sent at 0. The second starts only when the first receive has completed (at 30 with its host work),
    # so it is not there when the forward ends at 40 but at 30 + 25.
    found = both(
        program(
            rank(0, send(), send()),
            rank(1, recv(0, 5), forward(10), recv(0, 5)),
            channels=(channel(25, 25),),
        )
    )
    assert found[1] == ((0, 30), (30, 40), (40, 60))


def test_a_message_travels_under_the_receivers_compute() -> None:
    found = both(
        program(
            rank(0, forward(10), send()),
            rank(1, forward(100), recv(), forward(10)),
            channels=(channel(25),),
        )
    )
    assert found[1] == ((0, 100), (100, 100), (100, 110))


def test_sends_are_asynchronous() -> None:
    found = both(program(rank(0, send(0, 1), forward(10)), rank(1, recv()), channels=(channel(1000),)))
    assert found == (((0, 1), (1, 11)), ((0, 1001),))


def test_a_step_is_a_meeting_and_its_span_starts_when_the_rank_reaches_it() -> None:
    found = both(
        program(rank(0, forward(10), step(7)), rank(1, forward(30), step(9)), rank(2, forward(90)), meetings=(2,))
    )
    assert found == (((0, 10), (10, 37)), ((0, 30), (30, 39)), ((0, 90),))


def test_a_cycle_of_waits_is_named() -> None:
    stuck = program(
        rank(0, recv(1), send(0)),
        rank(1, recv(0), send(1)),
        channels=(channel(1), channel(1, source=1, target=0)),
    )
    for engine in (run_pipeline, recur):
        with pytest.raises(PlanError, match=r"rank 0 at instruction 0 \(recv\), rank 1 at instruction 0 \(recv\) wait"):
            engine(stuck)


class Clock:
    """A stage of one layer takes T_NS each way for each hTask: only rope has a price. Everything else is free."""

    model_id, calibrated = "clock", False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=T_NS if op.family == "rope" else 0)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=0)


class Noise:
    """Prices that look random but depend only on the operator and the link."""

    model_id, calibrated = "noise", False

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _draw(self, *parts: object) -> int:
        return zlib.crc32(repr((self.seed, *parts)).encode())

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=self._draw(op) % 997, host_ns=self._draw("host", op) % 101)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=self._draw(op, link) % 29_989)


def homogeneous(tiny_workload: Any, tiny_state: Any, tasks: int, stages: int, microbatches: int) -> Plan:
    """N equal hTasks in N buckets on S stages of one layer each, C micro-batches, 1F1B."""
    workload = tiny_workload(tasks, datasets=("sst2",), samples=(microbatches,), ranks=(4,))
    model = dataclasses.replace(workload.model, layers=stages)
    workload = dataclasses.replace(workload, model=model)
    state = tiny_state(workload, pp=stages, microbatches=microbatches, cluster="8xcpu")
    ids = [t.task_id for t in workload.tasks]
    instance = make_instance(state, "all", [[t] for t in ids], [[i] for i in range(tasks)])
    return Plan(workload=workload, cluster=state.cluster, instances=(instance,))


def makespan_ns(plan: Plan, cost: Any) -> int:
    times = both(price(bind(plan, seed=0), cost, StageCache(cost)))
    return max(end for listing in times for _, end in listing)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_homogeneous_1f1b_law(tiny_workload: Any, tiny_state: Any, stages: int, tasks: int, microbatches: int) -> None:
    plan = homogeneous(tiny_workload, tiny_state, tasks, stages, microbatches)
    assert makespan_ns(plan, Clock()) == 2 * (stages - 1) * T_NS + 2 * microbatches * tasks * T_NS


@pytest.mark.parametrize(("microbatches", "gain"), [(8, 1.31), (4, 1.60)])
def test_interleaving_gain_of_eight_equal_tasks_on_four_stages(
    tiny_workload: Any, tiny_state: Any, microbatches: int, gain: float
) -> None:
    interleaved = homogeneous(tiny_workload, tiny_state, 8, 4, microbatches)
    alone = homogeneous(tiny_workload, tiny_state, 1, 4, microbatches)
    assert round(8 * makespan_ns(alone, Clock()) / makespan_ns(interleaved, Clock()), 2) == gain


def test_eight_instances_in_sequence_take_eight_times_one(tiny_workload: Any, tiny_state: Any) -> None:
    together = homogeneous(tiny_workload, tiny_state, 8, 4, 4)
    state = tiny_state(together.workload, pp=4, microbatches=4, cluster="8xcpu")
    single = tuple(make_instance(state, t.task_id, [[t.task_id]], [[0]]) for t in together.workload.tasks)
    sequence = dataclasses.replace(together, instances=single)
    # Only the step, at which all ranks meet, keeps an instance's forwards out of the drain before it.
    alone = homogeneous(tiny_workload, tiny_state, 1, 4, 4)
    assert makespan_ns(sequence, Clock()) == 8 * makespan_ns(alone, Clock())


@st.composite
def programs(draw: st.DrawFn, make_workload: Any, make_state: Any) -> Bound:
    """A bound plan of random stages, tp, buckets, sizes, alignment and order."""
    tasks, pp, tp = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.sampled_from((1, 1, 2)))
    samples = tuple(draw(st.lists(st.integers(1, 5), min_size=tasks, max_size=tasks)))
    workload = make_workload(tasks, model="tiny-llama", samples=samples)
    if tp == 2:  # tiny-llama has 3 kv heads, which two ranks cannot share
        workload = dataclasses.replace(workload, model=dataclasses.replace(workload.model, kv_heads=2))
    device = draw(st.sampled_from(("2x4xcpu", "2x4xA100-ib")))
    state = make_state(workload, tp=tp, pp=pp, microbatches=draw(st.integers(1, 4)), cluster=device)
    ids = list(draw(st.permutations([t.task_id for t in workload.tasks])))
    groups = partition(draw, ids)
    buckets = partition(draw, list(range(len(groups))))
    alignment: Alignment = draw(st.sampled_from(ALIGNMENTS))
    chunk_tokens = draw(st.sampled_from((0, 32, 48, 100, 128, 1000))) if alignment == "chunk" else 0
    instance = make_instance(state, "random", groups, buckets, alignment, chunk_tokens)
    feed = tuple(draw(st.permutations(bucket_major(instance.buckets))))
    instance = ordered(draw, dataclasses.replace(instance, feed=feed))
    plan = Plan(workload=workload, cluster=state.cluster, instances=(instance,))
    return bind(plan, seed=draw(st.integers(0, 99)), steps=instance.steps * draw(st.integers(1, 2)))


def partition(draw: st.DrawFn, items: list[Any]) -> list[list[Any]]:
    cuts = sorted(draw(st.sets(st.integers(1, len(items) - 1)))) if len(items) > 1 else []
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def ordered(draw: st.DrawFn, instance: Instance) -> Instance:
    """A random valid order: 1F1B, GPipe, eager under a random budget, or two steps that run into each other."""
    kind = draw(st.sampled_from(("1f1b", "gpipe", "eager", "two steps")))
    if kind == "1f1b":
        return instance
    if kind == "gpipe":
        return dataclasses.replace(instance, order="gpipe")
    stages = instance.layout.pp
    if kind == "eager":
        seed, budget = draw(st.integers(0, 99)), draw(st.integers(1, 4))
        noise = Noise(seed)
        made = eager(
            instance.feed,
            stages,
            lambda *key: 1 + noise._draw(key) % 50,
            lambda *key: 1,
            [budget] * stages,
            chunks_of(instance),
        ).orders
        return dataclasses.replace(instance, order="explicit", orders=with_steps(instance, [made]))
    make = draw(st.sampled_from((one_f_one_b, gpipe)))
    orders = with_steps(instance, [make(instance.feed, stages, step, chunks_of(instance)) for step in range(2)])
    return dataclasses.replace(instance, order="explicit", orders=orders, steps=2)


def with_steps(instance: Instance, passes: list[tuple[StageOrder, ...]]) -> tuple[StageOrder, ...]:
    """The passes one after the other, each task's step as soon as its last backward of the pass is done."""
    holders = {
        (b, u): {p.task for p in unit.parts}
        for b, bucket in enumerate(instance.buckets)
        for u, unit in enumerate(bucket.units)
    }
    found: list[StageOrder] = []
    for stage in range(instance.layout.pp):
        actions: list[Action] = []
        for number, orders in enumerate(passes):
            chunks = chunks_of(instance)
            open_units = {
                task: sum(chunks[key] for key, held in holders.items() if task in held) for task in instance.tasks
            }
            for action in orders[stage].actions:
                actions.append(action)
                for task in instance.tasks:
                    if action.op == "backward" and task in holders[action.bucket, action.unit]:
                        open_units[task] -= 1
                        if not open_units[task]:
                            actions.append(Action(op="step", task=task, step=number))
        found.append(StageOrder(stage=stage, actions=tuple(actions)))
    return tuple(found)


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_closed_form_equals_the_event_queue_on_random_programs(
    tiny_workload: Any, tiny_state: Any, data: Any, seed: int
) -> None:
    bound = data.draw(programs(tiny_workload, tiny_state))
    assert [p for p in check(bound.plan) if "does not fit" not in p] == []
    cost = Noise(seed)
    by_queue = price(bound, cost, StageCache(cost, run_blocks))
    by_formula = price(bound, cost, StageCache(cost, recur_blocks))
    times, _ = run_pipeline(by_queue)
    assert times == recur(by_formula)
    assert [len(t) for t in times] == [len(r.instructions) for r in bound.program.ranks]


@given(data=st.data())
def test_closed_form_equals_the_event_queue_on_random_figures(data: Any) -> None:
    """Ranks in a row pass messages down and up; every duration and transfer is drawn."""
    ranks, messages = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    few = st.integers(0, 40)
    times = st.lists(few, min_size=messages, max_size=messages)
    channels = tuple(
        channel(*data.draw(times), source=r + (p == "gradient"), target=r + (p == "activation"), payload=p)
        for r in range(ranks - 1)
        for p in PAYLOADS
    )
    lists = []
    for r in range(ranks):
        found: list[Priced] = []
        ups = [2 * (r - 1)] if r else []
        downs = [2 * r] if r + 1 < ranks else []
        for _ in range(messages):
            found += [recv(c, data.draw(few)) for c in ups] + [forward(data.draw(few))]
            found += [send(c, data.draw(few)) for c in downs]
        for _ in range(messages):
            found += [recv(c + 1, data.draw(few)) for c in downs] + [backward(data.draw(few))]
            found += [send(c + 1, data.draw(few)) for c in ups]
        lists.append(rank(r, *found, step(data.draw(few))))
    both(program(*lists, channels=channels, meetings=(ranks,)))


def test_each_part_of_an_instruction_is_priced_once_and_where_it_belongs(tiny_workload: Any, tiny_state: Any) -> None:
    """All prices by hand: instruction 3, launch 0, operators 0 but rope, send 5, recv 6, p2p 100, AdamW 40, norm 50."""

    class Parts(Clock):
        def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
            named = {"instruction": 3, "send": 5, "recv": 6, "adamw": 40, "rope": T_NS}
            return Cost(p50_ns=named.get(op.family, 0))

        def link_latency(self, op: Op, link: Link) -> Cost:
            if op.family == "p2p":
                return Cost(p50_ns=100)
            assert (op.size, op.shape) == ((4,), (2,))
            return Cost(p50_ns=50)

    bound = bind(homogeneous(tiny_workload, tiny_state, 1, 2, 1), seed=0)
    times = both(price(bound, Parts(), StageCache(Parts())))
    clock = T_NS + 3
    begun = clock + 5 + 100 + 6  # stage 1 may start
    assert times[1][:4] == (
        (0, begun),
        (begun, begun + clock),
        (begun + clock, begun + 2 * clock),
        (begun + 2 * clock, begun + 2 * clock + 5),
    )
    arrived = begun + 2 * clock + 5 + 100 + 6
    assert times[0] == (
        (0, clock),
        (clock, clock + 5),
        (clock + 5, arrived),
        (arrived, arrived + clock),
        (arrived + clock, arrived + clock + 90),
    )
    assert times[1][4] == (begun + 2 * clock + 5, arrived + clock + 90)


def test_an_operator_alone_takes_host_and_device_in_turn_on_a_cpu_and_side_by_side_on_a_gpu() -> None:
    presets = device_presets()
    assert alone_ns(Cost(p50_ns=10, host_ns=30), presets["cpu"]) == 40
    assert alone_ns(Cost(p50_ns=10, host_ns=30), presets["H100"]) == 30


def test_rings_wait_for_their_slowest_link(tiny_workload: Any) -> None:
    plan = Plan(workload=tiny_workload(1), cluster=parse_cluster("2x4xA100-ib"), instances=())
    assert plan.cluster.slowest_link([0, 1]).kind == "nvlink"
    assert plan.cluster.slowest_link([0, 1, 4]).kind == "ib"


def test_messages_cross_the_link_between_their_ranks(tiny_workload: Any, tiny_state: Any) -> None:
    """Two stages on one node, two on the next: the middle edge is slower."""

    class Links(Clock):
        def link_latency(self, op: Op, link: Link) -> Cost:
            return Cost(p50_ns={"nvlink": 1, "ib": 1000}[link.kind])

    plan = homogeneous(tiny_workload, tiny_state, 1, 4, 1)
    plan = dataclasses.replace(plan, cluster=parse_cluster("2x2xA100-ib"))
    priced = price(bind(plan, seed=0), Links(), StageCache(Links()))
    found = {(c.source, c.target): c.transfers_ns for c in priced.channels}
    assert found == {
        (0, 1): (1,),
        (1, 0): (1,),
        (1, 2): (1000,),
        (2, 1): (1000,),
        (2, 3): (1,),
        (3, 2): (1,),
    }


def test_ends_that_disagree_on_the_order_of_messages_are_refused(tiny_workload: Any, tiny_state: Any) -> None:
    plan = homogeneous(tiny_workload, tiny_state, 2, 2, 1)
    orders = list(stage_orders(plan.instances[0]))
    swapped = {0: 1, 1: 0}
    turned = tuple(dataclasses.replace(a, bucket=swapped[a.bucket]) if a.op != "step" else a for a in orders[1].actions)
    orders[1] = dataclasses.replace(orders[1], actions=turned)
    instance = dataclasses.replace(plan.instances[0], order="explicit", orders=tuple(orders))
    bound = bind(dataclasses.replace(plan, instances=(instance,)), seed=0)
    with pytest.raises(
        PlanError, match=r"channel 0→1 \(activation\): messages are not received in the order they are sent"
    ):
        price(bound, Clock(), StageCache(Clock()))


def test_a_missing_launch_list_is_named(tiny_workload: Any, tiny_state: Any) -> None:
    bound = bind(homogeneous(tiny_workload, tiny_state, 1, 2, 1), seed=0)
    kept = tuple(x for x in bound.program.launches if (x.stage, x.direction) != (1, "backward"))
    broken = dataclasses.replace(bound, program=dataclasses.replace(bound.program, launches=kept))
    with pytest.raises(PlanError, match="bucket 0 has no backward launch list for stage 1: add one"):
        price(broken, Clock(), StageCache(Clock()))
