"""Instances at once on the same devices: by hand, against a plain calculator, laws, what check and the executor refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.experiments.commands import execute
from muxtune.experiments.commands import simulate as simulate_command
from muxtune.policies.base import make_policy
from muxtune.sim.corun import MOMENTS, Beside, make_load
from muxtune.sim.cost.base import Cost
from muxtune.sim.cost.interference import CoRun, CoRunGrid, Interference
from muxtune.sim.cost.roofline import Roofline, attainable_ns
from muxtune.sim.pipeline import run_pipeline
from muxtune.sim.priced import Priced, PricedProgram, price
from muxtune.sim.simulate import estimate, simulate
from muxtune.sim.stage import StageCache
from muxtune.spec import ops
from muxtune.spec.bind import bind
from muxtune.spec.check import check
from muxtune.spec.cluster import DeviceSpec, device_presets
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_noun
from muxtune.spec.memory import rank_peaks, static_bytes
from muxtune.spec.ops import Op
from muxtune.spec.plan import Plan
from tests.programs import Noise, programs

A40 = device_presets()["A40"]
GEMM = ops.linear(1024, (4096, 4096), False, "forward", "bf16", 2)
EXAMPLES = settings(max_examples=20)


@dataclass(frozen=True)
class Crowd(Noise):
    """Noise whose operators take as many times as long as there are operators in their place, and a bit more."""

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        alone = super().latency(op, device)
        more_ns = sum(self.draw(op, x) % 31 for x in share)
        return replace(alone, p50_ns=alone.p50_ns * (1 + len(share)) + more_ns)


@dataclass(frozen=True)
class Turns:
    """fc2 takes 1000 ns alone, and so much for everything beside it; all else is free."""

    model_id: str = "turns"
    calibrated: bool = True

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=1000 * (1 + len(share)) if op.family == "linear" and op.shape[:2] == (512, 192) else 0)

    def link_latency(self, op: Op, link: Any) -> Cost:
        return Cost(p50_ns=0)


def test_slowdown_by_hand() -> None:
    """A neighbour that computes in the first half of its time slows in four of eight moments."""
    other = make_load(2000, [(GEMM, 1000)])
    assert other.seen == (GEMM,) * (MOMENTS // 2) + (None,) * (MOMENTS // 2)
    load = make_load(500, [(GEMM, 300)])
    grid = CoRunGrid(
        device="A40", points=(CoRun(family="linear", beside="linear", size=1024, load=1024, slowdown=1.5),)
    )
    measured, default = Beside(Interference(grid=grid), A40), Beside(Roofline(), A40)
    assert measured.slowed(load, ()).duration_ns == 500
    # 300 ns of kernels take half as long again in half of the time; one more neighbour that idles changes nothing.
    alone_ns = Roofline().latency(GEMM, A40).p50_ns
    stretch_ns = (-(-alone_ns * 15 // 10) - alone_ns) * 300 / alone_ns / 2
    found = measured.slowed(load, (other,))
    assert found.duration_ns == pytest.approx(500 + stretch_ns, abs=1)
    assert measured.slowed(load, (other, make_load(10, []))).duration_ns == found.duration_ns
    # The data sheet's default: both fill the device for their share of it, and all of that is a default.
    guess = default.slowed(load, (other,))
    assert 500 < guess.duration_ns <= 500 + 300 // 2
    assert guess.default_ns == pytest.approx(guess.duration_ns - 500, abs=1)


@given(
    calls=st.lists(
        st.tuples(st.sampled_from((64, 512, 4096)), st.sampled_from((16, 512, 4096)), st.sampled_from((512, 4096))),
        min_size=1,
        max_size=6,
    )
)
def test_the_default_never_gives_more_than_the_device_has(calls: list[tuple[int, int, int]]) -> None:
    """Operators at once, each at the rate that the others leave it, move no more bytes a second than the device can."""
    running = [ops.linear(tokens, (k, n), False, "forward", "bf16", 2) for tokens, k, n in calls]
    bandwidth = 0.75 * A40.bandwidth_bytes_per_s
    times_s = [attainable_ns(op, A40, tuple(running[:i] + running[i + 1 :])) / 1e9 for i, op in enumerate(running)]
    assert sum(op.moved_bytes / s for op, s in zip(running, times_s, strict=True)) <= bandwidth * (1 + 1e-9)


def at_once(plan: Plan) -> Plan:
    return replace(plan, sharing="corun")


def backbones(tiny_state: Any, workload: Any, **changes: Any) -> Plan:
    state = tiny_state(workload, **{"cluster": "4xA40", "microbatches": 1, **changes})
    return make_policy("hf-peft", Roofline()).plan(state)


def test_two_equal_instances_by_hand(tiny_state: Any, tiny_workload: Any) -> None:
    """Alone 4 layers of 1000 ns each way; at once both take twice as long, and end together."""
    plan = backbones(tiny_state, tiny_workload(2, samples=(1,)))
    assert plan.workload.model.linear_shape("fc2") == (512, 192)
    layers = plan.workload.model.layers
    for sharing, each_ns, end_ns in (("sequence", 1, 4), ("corun", 2, 4)):
        timeline = simulate(bind(replace(plan, sharing=sharing), seed=0), Turns()).timeline  # type: ignore[arg-type]
        clocks = [s.duration_ns for s in timeline.spans if s.subgraph < 0 and s.op in ("forward", "backward")]
        assert clocks == [each_ns * layers * 1000] * 4
        assert timeline.makespan_ns == end_ns * layers * 1000


@dataclass(eq=False)
class Running:
    """A work on something shared: what is left of it in its time alone, as of `since_ns`."""

    alone_ns: int
    left_ns: int
    since_ns: int
    slowed_ns: int = 0
    load: Any = None


@dataclass(eq=False)
class Lane:
    """One list of a rank: where it is, since when, and whether its instruction works."""

    rank: int
    instructions: tuple[Priced, ...]
    at: int = 0
    reached_ns: int = 0
    work: Running | None = None
    times: list[tuple[int, int]] = field(default_factory=list)


class Calculator:
    """Plain Python, no event queue: at each instant look at everything until nothing moves, then go to the next end."""

    def __init__(self, priced: PricedProgram) -> None:
        self.priced, self.now_ns = priced, 0
        self.lanes = [
            Lane(x.rank, x.instructions[places.start : places.stop]) for x in priced.ranks for places in x.lists
        ]
        self.sent = [0] * len(priced.channels)
        self.arrived, self.taken = list(self.sent), list(self.sent)
        self.moving: list[Running | None] = [None] * len(priced.channels)
        self.reached: list[set[int]] = [set() for _ in priced.meetings]

    def run(self) -> list[list[tuple[int, int]]]:
        while True:
            while any([self._lane(n, lane) for n, lane in enumerate(self.lanes)] + [*map(self._channel, self.all)]):
                pass
            ends = [self._end_ns(x) for x in self._works()]
            if not ends:
                assert all(lane.at == len(lane.instructions) for lane in self.lanes)
                return [lane.times for lane in self.lanes]
            self.now_ns = min(ends)

    @property
    def all(self) -> range:
        return range(len(self.sent))

    def _works(self) -> Iterator[Running]:
        yield from (lane.work for lane in self.lanes if lane.work)
        yield from (x for x in self.moving if x)

    def _end_ns(self, x: Running) -> int:
        return x.since_ns - (-x.left_ns * x.slowed_ns // x.alone_ns)

    def _settle(self, works: list[Running], slowed: Any) -> None:
        """The set has changed: round up what is left of each, and take the new rates."""
        for x in works:
            if x.slowed_ns:
                x.left_ns -= (self.now_ns - x.since_ns) * x.alone_ns // x.slowed_ns
            x.since_ns = self.now_ns
        for x in works:
            x.slowed_ns = slowed(x, [y for y in works if y is not x])

    def _device(self, rank: int) -> None:
        assert self.priced.beside is not None
        beside, works = self.priced.beside, [lane.work for lane in self.lanes if lane.rank == rank and lane.work]
        shared = [x for x in works if x.load]
        self._settle(shared, lambda x, rest: beside.slowed(x.load, tuple(y.load for y in rest)).duration_ns)

    def _edge(self, channel: int) -> None:
        mine = self.priced.channels[channel]
        same = [
            x
            for c, x in zip(self.priced.channels, self.moving, strict=True)
            if x and (c.source, c.target, c.payload) == (mine.source, mine.target, mine.payload)
        ]
        self._settle(same, lambda x, rest: x.alone_ns * (1 + len(rest)))

    def _channel(self, c: int) -> bool:
        x = self.moving[c]
        if x and self._end_ns(x) == self.now_ns:
            self.moving[c] = None
            self.arrived[c] += 1
            self._edge(c)
            return True
        posted = self.taken[c] + 1
        if x is None and self.arrived[c] < min(self.sent[c], posted):
            ns = self.priced.channels[c].transfers_ns[self.arrived[c]]
            if not ns:
                self.arrived[c] += 1
                return True
            self.moving[c] = Running(ns, ns, self.now_ns)
            self._edge(c)
            return True
        return False

    def _lane(self, number: int, lane: Lane) -> bool:
        if lane.at == len(lane.instructions):
            return False
        x = lane.instructions[lane.at]
        if lane.work:
            if self._end_ns(lane.work) != self.now_ns:
                return False
            shared = lane.work.load
            lane.work = None
            if shared:
                self._device(lane.rank)
            self._over(lane, x)
            return True
        if x.op == "step" and number not in self.reached[x.meeting]:
            self.reached[x.meeting].add(number)
            return True
        if not self._ready(x):
            return False
        if not x.duration_ns:
            self._over(lane, x)
            return True
        lane.work = Running(x.duration_ns, x.duration_ns, self.now_ns, load=x.load)
        if x.load:
            self._device(lane.rank)
        else:
            lane.work.slowed_ns = x.duration_ns
        return True

    def _ready(self, x: Priced) -> bool:
        if x.op == "recv":
            return self.arrived[x.channel] > self.taken[x.channel]
        return x.op != "step" or len(self.reached[x.meeting]) == self.priced.meetings[x.meeting]

    def _over(self, lane: Lane, x: Priced) -> None:
        if x.op == "send":
            self.sent[x.channel] += 1
        elif x.op == "recv":
            self.taken[x.channel] += 1
        lane.times.append((lane.reached_ns, self.now_ns))
        lane.reached_ns = self.now_ns
        lane.at += 1


@pytest.fixture(scope="module")
def bounds(tiny_workload: Any, tiny_state: Any) -> Any:
    """The strategy of bound plans whose instances run at once."""
    return programs(tiny_workload, tiny_state, sharing="corun")


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_the_engine_agrees_with_a_plain_calculator(bounds: Any, data: Any, seed: int) -> None:
    bound, cost = data.draw(bounds), Crowd(seed)
    assert [p for p in check(bound.plan) if "does not fit" not in p] == []
    priced = price(bound, cost, StageCache(cost))
    times, _ = run_pipeline(priced)
    if priced.beside:
        lanes = [list(x[p.start : p.stop]) for x, r in zip(times, priced.ranks, strict=True) for p in r.lists]
        assert lanes == Calculator(priced).run()
    else:
        assert len(bound.plan.instances) == 1


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999))
def test_laws(bounds: Any, data: Any, seed: int) -> None:
    """All runs once; never earlier than alone; at most twice the work of two; memory below the bound and back at its start."""
    bound, cost = data.draw(bounds), Crowd(seed)
    found = simulate(bound, cost)
    timeline = found.timeline
    whole = Counter((s.rank, s.index) for s in timeline.spans if s.subgraph < 0)
    assert whole == Counter((r.rank, i) for r in bound.program.ranks for i in range(len(r.instructions)))
    for index, instance in enumerate(bound.plan.instances):
        tasks = tuple(t for t in bound.plan.workload.tasks if t.task_id in instance.tasks)
        workload = replace(bound.plan.workload, tasks=tasks)
        alone = bind(
            replace(bound.plan, workload=workload, instances=(instance,)),
            seed=bound.program.seed,
            steps=bound.program.steps,
        )
        mine = [s.end_ns for s in timeline.spans if s.key.instance == index]
        assert max(mine) >= simulate(alone, cost).timeline.makespan_ns
    for peak in rank_peaks(bound):
        samples = [s.in_use_bytes for s in timeline.memory if s.rank == peak.rank]
        assert samples[0] == samples[-1] == static_bytes(bound.plan, peak.rank)
        assert max(samples) <= peak.peak_bytes
    assert sum(share.fraction for share in found.estimate.stalls) == pytest.approx(1.0)
    assert 0 <= found.estimate.bubble_fraction <= 1
    for span in timeline.spans:
        if span.subgraph >= 0:
            (around,) = [s for s in timeline.spans if (s.rank, s.index, s.subgraph) == (span.rank, span.index, -1)]
            assert around.start_ns <= span.start_ns <= span.end_ns <= around.end_ns


def test_one_instance_alone_is_as_before(tiny_state: Any, tiny_workload: Any) -> None:
    plan = backbones(tiny_state, tiny_workload(1), pp=2, microbatches=2)
    found = [simulate(bind(p, seed=0), Roofline()) for p in (plan, at_once(plan))]
    assert found[0].timeline.spans == found[1].timeline.spans
    assert found[0].estimate == found[1].estimate


def test_the_result_says_what_it_rests_on(tiny_state: Any, tiny_workload: Any) -> None:
    plan = at_once(backbones(tiny_state, tiny_workload(2), pp=2))
    for cost, default in ((Roofline(), 1.0), (Turns(), 0.0)):
        found = estimate(plan, cost, seed=0)
        assert found.corun_slowed_fraction is not None
        assert found.corun_slowed_fraction > 0
        assert found.corun_default_fraction == pytest.approx(default, abs=0.01)
    assert estimate(replace(plan, sharing="sequence"), Roofline(), seed=0).corun_slowed_fraction is None


def test_memory_adds_up(tiny_state: Any, tiny_workload: Any) -> None:
    """All backbones, and the peaks of all that is in flight."""
    plan = backbones(tiny_state, tiny_workload(2), pp=2)
    alone = [
        rank_peaks(
            bind(
                replace(plan, workload=replace(plan.workload, tasks=(task,)), instances=(instance,)),
                seed=0,
            )
        )
        for task, instance in zip(plan.workload.tasks, plan.instances, strict=True)
    ]
    together = rank_peaks(bind(at_once(plan), seed=0))
    assert [p.peak_bytes for p in together] == [a.peak_bytes + b.peak_bytes for a, b in zip(*alone, strict=True)]
    limit = replace(plan.cluster.device, memory_bytes=together[0].peak_bytes - 1)
    short = replace(at_once(plan), cluster=replace(plan.cluster, device=limit))
    assert "all 2 instances that run at once at their peaks" in check(short)[0]
    assert check(replace(short, sharing="sequence")) == ()


def test_what_check_refuses(tiny_state: Any, tiny_workload: Any) -> None:
    plan = at_once(backbones(tiny_state, tiny_workload(2), pp=2))
    assert check(plan) == ()
    assert check(replace(plan, residency="swapped"))[0].startswith("sharing `corun` with residency `swapped`")
    first, second = plan.instances
    apart = replace(plan, instances=(first, replace(second, devices=(1, 2))))
    (problem,) = check(apart)
    assert problem == (
        f"instances {first.name} and {second.name} run at once on device 1, with devices [0, 1] at tp=1 and [1, 2] at tp=1: "
        "give both the same, or use sharing `sequence`"
    )
    assert check(replace(apart, sharing="sequence")) == ()


def test_the_baselines_from_the_command_line(tmp_path: Path, tiny_state: Any, tiny_workload: Any) -> None:
    for policy in ("hf-peft", "nemo"):
        state = tiny_state(tiny_workload(3), pp=2, cluster="2xA40", microbatches=2)
        state = replace(state, evaluate=lambda p: estimate(p, Roofline(), seed=0))
        plan = make_policy(f"{policy}:sharing=corun", Roofline()).plan(state)
        assert plan.sharing == "corun"
        write_noun(plan, tmp_path / "plan.json")
        body = simulate_command.run(tmp_path / "plan.json")
        assert (body["sharing"], body["corun_default_fraction"]) == ("corun", pytest.approx(1.0, abs=0.01))
        assert f"{policy}: instances run at once on a device and take" in simulate_command.show(body)
        with pytest.raises(InputError, match="sharing `corun`: the executor runs instances in turn"):
            execute.run(tmp_path / "plan.json")
    with pytest.raises(InputError, match="what runs at once stays in memory"):
        make_policy("hf-peft:sharing=corun,residency=swapped", Roofline())
