"""Laws of any simulated Program: work conserved, streams exclusive, lower bounds, monotone under a fixed order, memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.sim.priced import PricedProgram, price
from muxtune.sim.recurrence import recur
from muxtune.sim.simulate import simulate
from muxtune.sim.stage import StageCache
from muxtune.spec.catalogue import StageContext, subgraph_ops
from muxtune.spec.isolated import launched_subgraphs, launched_together
from muxtune.spec.memory import stage_context, static_bytes
from muxtune.spec.ops import COLLECTIVES, Op
from muxtune.spec.order import Template, eager
from muxtune.spec.program import Bound, Instruction, UnitKey
from muxtune.spec.timeline import Span
from tests.oracle import answer
from tests.programs import Noise, programs

EXAMPLES = settings(max_examples=40)


@pytest.fixture(scope="module")
def bounds(tiny_workload: Any, tiny_state: Any) -> Any:
    """The strategy of bound plans; `device` fixes the cluster."""
    return lambda device="": programs(tiny_workload, tiny_state, device)


def site(bound: Bound, rank: int, x: Instruction) -> StageContext:
    """The stage on which a rank runs an instruction."""
    instance = bound.plan.instances[x.key.instance]
    return stage_context(bound.plan, x.key.instance, instance.layout.stage_of(instance.devices.index(rank)))


def clocks(bound: Bound) -> Iterator[tuple[int, int, Instruction]]:
    """(rank, index, instruction) of every forward and backward."""
    for listing in bound.program.ranks:
        for index, x in enumerate(listing.instructions):
            if x.op in ("forward", "backward"):
                yield listing.rank, index, x


def way(x: Instruction) -> Any:
    return "forward" if x.op == "forward" else "backward"


def clock_ops(bound: Bound, rank: int, x: Instruction) -> list[tuple[Op, ...]]:
    """The operators of every subgraph of every hTask with rows in the unit of a forward or backward."""
    (work,) = [w for w in bound.program.units if w.key == x.key]
    return [ops for b in work.batches for ops in subgraph_ops(site(bound, rank, x), b, way(x))]


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999))
def test_every_instruction_and_every_launched_subgraph_runs_exactly_once(bounds: Any, data: Any, seed: int) -> None:
    bound = data.draw(bounds())
    timeline = simulate(bound, Noise(seed)).timeline
    whole = Counter((s.rank, s.index) for s in timeline.spans if s.subgraph < 0)
    assert whole == Counter((r.rank, i) for r in bound.program.ranks for i in range(len(r.instructions)))
    expected: Counter[tuple[Any, ...]] = Counter()
    units = {w.key: w for w in bound.program.units}
    for rank, index, x in clocks(bound):
        context = site(bound, rank, x)
        isolated = bound.plan.instances[x.key.instance].buckets[x.key.bucket].adapter_fusion == "bucket"
        subgraphs = launched_subgraphs(context.layout, context.stage, way(x), isolated)
        tasks = {b.htask: tuple(task for task, _, _ in b.segments()) for b in units[x.key].batches}
        place = (x.key.instance, x.key.bucket, context.stage, x.op)
        (listed,) = [y for y in bound.program.launches if (y.instance, y.bucket, y.stage, y.direction) == place]
        there = [launch for launch in listed.launches if launch.htask in tasks]
        assert Counter((y.htask, y.subgraph) for y in there) == Counter(itertools.product(tasks, range(len(subgraphs))))
        for run in launched_together(there, subgraphs):
            carried = tuple(task for launch in run for task in tasks[launch.htask])
            number = run[0].subgraph
            expected[rank, index, x.key, carried, number, subgraphs[number].name] += 1
    inner = (s for s in timeline.spans if s.subgraph >= 0)
    assert Counter((s.rank, s.index, s.key, s.tasks, s.subgraph, s.op) for s in inner) == expected


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999))
def test_every_operator_is_priced_exactly_once(bounds: Any, data: Any, seed: int) -> None:
    """Device and host time of the Program are the sum over all its operators, launches, instructions and messages."""
    bound, cost = data.draw(bounds()), Noise(seed)
    costs = price(bound, cost, StageCache(cost)).costs
    assert costs.p50_ns + costs.host_ns == answer(bound, cost).priced_ns


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999))
def test_no_stream_runs_two_spans_at_once(bounds: Any, data: Any, seed: int) -> None:
    bound = data.draw(bounds())
    timeline = simulate(bound, Noise(seed)).timeline
    is_cpu = bound.plan.cluster.device.is_cpu  # where collectives take the compute's place
    streams: dict[tuple[Any, ...], list[Span]] = {}
    for span in timeline.spans:
        stream = "" if span.subgraph < 0 else "compute" if is_cpu else span.stream
        streams.setdefault((span.rank, stream), []).append(span)
    for spans in streams.values():
        spans.sort(key=lambda s: (s.start_ns, s.end_ns))
        assert all(before.end_ns <= after.start_ns for before, after in itertools.pairwise(spans))


class Chains:
    """Ends of the longest chains forward → send → message → recv → forward … backward → step → next step's forward.

    What shares a device without needing each other's result is left out.
    """

    def __init__(self, bound: Bound, priced: PricedProgram) -> None:
        self.tasks = {w.key: set(w.tasks) for w in bound.program.units}
        self.ns: dict[tuple[int, str, UnitKey, str | None], int] = {}
        self.moves_ns: dict[tuple[int, str, UnitKey], tuple[int, int]] = {}
        at = [0] * len(priced.channels)
        for listing, costs in zip(bound.program.ranks, priced.ranks, strict=True):
            for x, found in zip(listing.instructions, costs.instructions, strict=True):
                self.ns[listing.rank, x.op + (x.payload or ""), x.key, x.task] = found.duration_ns
                if x.op == "recv":
                    assert x.peer is not None
                    assert x.payload is not None
                    transfer_ns = priced.channels[found.channel].transfers_ns[at[found.channel]]
                    at[found.channel] += 1
                    self.moves_ns[listing.rank, x.payload, x.key] = (x.peer, transfer_ns + found.duration_ns)
        self.end_ns = cache(self._end_ns)

    def longest_ns(self) -> int:
        """The longest chain of the Program."""
        return max(self.end_ns(*place) for place in self.ns if place[1] in ("forward", "backward", "step"))

    def _end_ns(self, rank: int, op: str, key: UnitKey, task: str | None = None) -> int:
        own_ns = self.ns[rank, op, key, task]
        if op == "step":
            done = (
                self.end_ns(r, o, k)
                for r, o, k, _ in self.ns
                if o == "backward" and (k.step, k.instance) == (key.step, key.instance) and task in self.tasks[k]
            )
            return own_ns + max(done)
        payload = "activation" if op == "forward" else "gradient"
        ready_ns = [0] if op == "forward" else [self.end_ns(rank, "forward", key)]
        if (rank, payload, key) in self.moves_ns:
            sender, moved_ns = self.moves_ns[rank, payload, key]
            handed_ns = self.ns[sender, "send" + payload, key, None]
            ready_ns.append(self.end_ns(sender, op, key) + handed_ns + moved_ns)
        if op == "forward":
            ready_ns += (
                self.end_ns(*place)
                for place in self.ns
                if place[:2] == (rank, "step")
                and (place[2].step, place[2].instance) == (key.step - 1, key.instance)
                and place[3] in self.tasks[key]
            )
        return own_ns + max(ready_ns)


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999))
def test_makespan_is_at_least_the_critical_path_and_every_load(bounds: Any, data: Any, seed: int) -> None:
    bound, cost = data.draw(bounds()), Noise(seed)
    priced = price(bound, cost, StageCache(cost))
    timeline = simulate(bound, cost).timeline
    assert timeline.makespan_ns >= Chains(bound, priced).longest_ns()
    for listing in priced.ranks:
        assert timeline.makespan_ns >= sum(x.duration_ns for x in listing.instructions)
        for stream in ("compute", "comm"):
            runs = (x.run for x in listing.instructions if x.run)
            load_ns = sum(s.end_ns - s.start_ns for run in runs for s in run.spans if s.stream == stream)
            assert timeline.makespan_ns >= load_ns
    for channel in priced.channels:
        assert timeline.makespan_ns >= sum(channel.transfers_ns)


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999))
def test_nothing_beats_free_links_a_free_host_and_full_overlap(bounds: Any, data: Any, seed: int) -> None:
    """Every rank must run its kernels one after the other, whatever moves for nothing under them."""
    bound, cost = data.draw(bounds()), Noise(seed)
    loads: dict[int, int] = {}
    for rank, _, x in clocks(bound):
        ops = [op for group in clock_ops(bound, rank, x) for op in group if op.family not in COLLECTIVES]
        kernels_ns = sum(cost.latency(op, bound.plan.cluster.device).p50_ns for op in ops)
        loads[rank] = loads.get(rank, 0) + kernels_ns
    timeline = simulate(bound, cost).timeline
    assert timeline.makespan_ns >= max(loads.values())
    free = simulate(bound, Noise(seed, link_share=(0, 1))).timeline
    assert timeline.makespan_ns >= free.makespan_ns >= max(loads.values())


def ends_ns(bound: Bound, cost: Noise) -> list[int]:
    times = recur(price(bound, cost, StageCache(cost)))
    return [end_ns for listing in times for _, end_ns in listing]


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999), more_ns=st.integers(1, 500))
def test_adding_work_under_a_fixed_order_makes_nothing_earlier(bounds: Any, data: Any, seed: int, more_ns: int) -> None:
    bound = data.draw(bounds())
    base, more = ends_ns(bound, Noise(seed)), ends_ns(bound, Noise(seed, more_ns=more_ns))
    assert all(a <= b for a, b in zip(base, more, strict=True))
    assert max(base) <= max(more)


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999), share=st.integers(0, 9))
def test_more_bandwidth_under_a_fixed_order_makes_nothing_later(bounds: Any, data: Any, seed: int, share: int) -> None:
    bound = data.draw(bounds())
    slow, fast = ends_ns(bound, Noise(seed)), ends_ns(bound, Noise(seed, link_share=(share, 10)))
    assert all(a >= b for a, b in zip(slow, fast, strict=True))


#: Three units on two stages, two of them in flight at once: ns of the forwards and backwards of units 0, 1, 2.
LATENCIES = {
    (0, "forward"): (1, 1, 2),
    (0, "backward"): (2, 1, 1),
    (1, "forward"): (2, 2, 1),
    (1, "backward"): (2, 1, 1),
}


def template(latencies: dict[tuple[int, str], tuple[int, ...]]) -> Template:
    feed = [(0, u) for u in range(3)]
    return eager(feed, 2, lambda stage, key, direction: latencies[stage, direction][key[1]], lambda *_: 1, [2, 2])


def test_a_list_schedule_that_is_derived_anew_may_get_longer_with_less_work() -> None:
    """Graham's anomaly, found by search: stage 1 runs forward 1 in 1 ns instead of 2, and 12 ns become 13.

    Both: stage 0 runs F0 0–1, F1 1–2, then holds two units; stage 1 runs F0 1–3, B0 3–5; stage 0 runs B0 5–7.
    With 2: stage 1 runs F1 5–7, so that at 7 stage 0 takes F2 7–9; B1 7–8, F2 9–10, B2 10–11 on stage 1; B2 11–12.
    With 1: stage 1 runs F1 5–6, B1 6–7, so that at 7 stage 0 takes B1 7–8 first, F2 8–10; F2 10–11, B2 11–12; B2 12–13.
    """
    slow, fast = template(LATENCIES), template(LATENCIES | {(1, "forward"): (2, 1, 1)})
    assert (slow.makespan_ns, fast.makespan_ns) == (12, 13)
    assert slow.orders != fast.orders


@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 999))
def test_memory_returns_to_its_start(bounds: Any, data: Any, seed: int) -> None:
    bound = data.draw(bounds())
    timeline = simulate(bound, Noise(seed)).timeline
    for listing in bound.program.ranks:
        samples = [s for s in timeline.memory if s.rank == listing.rank]
        assert samples[0].in_use_bytes == samples[-1].in_use_bytes == static_bytes(bound.plan, listing.rank)
        assert (len(samples) > 1) == any(x.op == "forward" for x in listing.instructions)
        assert min(s.in_use_bytes for s in samples) == samples[0].in_use_bytes
