"""Inside a clock: streams, host and collectives, by hand and against the closed form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.sim.cost.base import Cost
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.recurrence import recur_blocks
from muxtune.sim.stage import Site, StageCache, Way, stage_run
from muxtune.sim.streams import Block, StreamName, run_blocks
from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext, stage_subgraphs, subgraph_ops
from muxtune.spec.cluster import LINKS, DeviceSpec, Link, device_presets
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.ops import Op
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Launch

CPU, GPU = device_presets()["cpu"], device_presets()["A100"]
TINY = model_preset("tiny-test")
WAYS: tuple[Way, Way] = ("forward", "backward")
LINK = LINKS["nvlink"]


def block(
    htask: int,
    device_ns: int,
    stream: StreamName = "compute",
    *,
    host_ns: int = 0,
    first_ns: int | None = None,
    subgraph: int = 0,
    shared_ns: int = 0,
) -> Block:
    first = host_ns if first_ns is None else first_ns
    return Block(
        htask=htask,
        subgraph=subgraph,
        stream=stream,
        resource=stream,
        first_ns=first,
        host_ns=host_ns,
        device_ns=device_ns,
        tail_ns=max(host_ns, first + device_ns),
        shared_ns=shared_ns,
        shared_tail_ns=max(host_ns, first + shared_ns),
    )


def times(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    spans, _ = run_blocks(blocks)
    return [(s.start_ns, s.end_ns) for s in spans]


def test_compute_stream_is_fifo() -> None:
    assert times([block(0, 10), block(1, 5), block(0, 3)]) == [(0, 10), (10, 15), (15, 18)]


def test_a_collective_runs_under_the_compute_of_another_htask() -> None:
    # hTask 0: compute 10, collective 8, compute 4. hTask 1 computes 6 meanwhile. The collective ends at 18.
    launches = [block(0, 10), block(0, 8, "comm"), block(1, 6), block(0, 4)]
    assert times(launches) == [(0, 10), (10, 18), (10, 16), (18, 22)]


def test_a_stream_does_not_overtake() -> None:
    # hTask 0's second compute waits for its collective, and hTask 1, launched later, waits behind it.
    launches = [block(0, 10), block(0, 8, "comm"), block(0, 4), block(1, 6)]
    assert times(launches) == [(0, 10), (10, 18), (18, 22), (22, 28)]


def test_host_bound_launches_by_hand() -> None:
    # The host needs 100 a launch, the device 30: each kernel waits for its launch, the host never waits.
    spans, _ = run_blocks([block(h, 30, host_ns=100) for h in range(3)])
    assert [(s.start_ns, s.end_ns) for s in spans] == [(100, 130), (200, 230), (300, 330)]
    assert [s.stall_ns for s in spans] == [100, 70, 70]


def test_device_bound_launches_wait_for_the_host_once() -> None:
    spans, _ = run_blocks([block(h, 100, host_ns=30) for h in range(3)])
    assert [(s.start_ns, s.end_ns) for s in spans] == [(30, 130), (130, 230), (230, 330)]
    assert [s.stall_ns for s in spans] == [30, 0, 0]


def test_a_subgraph_starts_with_its_first_kernel_not_its_last() -> None:
    # Two kernels of 50, issued at 10 and 20 of a launch that takes the host 20.
    one = Block(
        htask=0, subgraph=0, stream="compute", resource="compute", first_ns=10, host_ns=20, device_ns=100, tail_ns=110
    )
    assert times([one]) == [(10, 110)]


def test_compute_under_a_collective_is_slowed_where_it_overlaps() -> None:
    # hTask 1 computes 6 alone, 9 under a collective. The collective (10-16) covers 6/9 of it; the last third takes 2.
    launches = [block(0, 10), block(0, 6, "comm"), block(1, 6, shared_ns=9)]
    spans, _ = run_blocks(launches)
    assert [(s.start_ns, s.end_ns, s.slowed_ns) for s in spans] == [(0, 10, 0), (10, 16, 0), (10, 18, 2)]
    # Covered from its third nanosecond on: 2 alone is 1/3, the other 2/3 take 6 under the collective.
    late = [block(0, 10), block(1, 6, shared_ns=9), block(0, 6, "comm", host_ns=12)]
    assert times(late) == [(0, 10), (10, 18), (12, 18)]


def test_a_slowed_end_is_rounded_up() -> None:
    # 3 alone, 4 shared: 12 units. 2 ns under the collective work off 6, the other 6 take 1.5 ns at 4 a nanosecond.
    launches = [block(0, 5), block(0, 2, "comm"), block(1, 3, shared_ns=4)]
    assert times(launches)[-1] == (5, 9)


def test_nothing_is_slowed_without_a_collective_beside_it() -> None:
    launches = [block(0, 10, shared_ns=20), block(0, 6, "comm"), block(0, 6, shared_ns=9)]
    assert times(launches) == [(0, 10), (10, 16), (16, 22)]


def test_a_host_bound_block_hides_its_slowing() -> None:
    # Kernels of 5 every 10 of the host: 8 each under a collective still ends within 10.
    launches = [
        block(1, 0, "comm"),
        block(0, 100, "comm"),
        Block(
            htask=1,
            subgraph=0,
            stream="compute",
            resource="compute",
            first_ns=10,
            host_ns=30,
            device_ns=15,
            tail_ns=35,
            shared_ns=24,
            shared_tail_ns=38,
        ),
    ]
    assert times(launches)[-1] == (10, 38)


blocks = st.lists(
    st.builds(
        lambda htask, device, comm, first, rest, late, more: Block(
            htask=htask,
            subgraph=0,
            stream="comm" if comm else "compute",
            resource="comm" if comm else "compute",
            first_ns=first,
            host_ns=first + rest,
            device_ns=device,
            tail_ns=first + max(rest, device) + late,
            shared_ns=device + more,
            shared_tail_ns=first + max(rest, device) + late + more // 2,
        ),
        st.integers(0, 3),
        st.integers(0, 50),
        st.booleans(),
        st.integers(0, 30),
        st.integers(0, 30),
        st.integers(0, 10),
        st.integers(0, 40),
    ),
    max_size=25,
)


@given(blocks)
def test_closed_form_equals_the_event_queue(found: list[Block]) -> None:
    spans, events = run_blocks(found)
    assert spans == recur_blocks(found)[0]
    assert events > 0


@given(blocks)
def test_streams_and_dependencies_are_respected(found: list[Block]) -> None:
    spans, _ = run_blocks(found)
    for stream in ("compute", "comm"):
        mine = [s for s in spans if s.stream == stream]
        assert all(a.end_ns <= b.start_ns for a, b in itertools.pairwise(mine))
    for htask in range(4):
        mine = [s for s in spans if s.htask == htask]
        assert all(a.end_ns <= b.start_ns for a, b in itertools.pairwise(mine))
    assert all(s.start_ns <= s.end_ns and s.stall_ns >= 0 for s in spans)


class Formula:
    """Every operator takes 7 ns and 3 ns of host, a launch 20 ns of host, a collective 40 ns."""

    model_id, calibrated = "formula", False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=20) if op.family == "launch" else Cost(p50_ns=7, host_ns=3, relative_error=0.5, joules=1.0)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=40, extrapolated=True)


def site(device: DeviceSpec, tp: int = 1, stage: int = 0, pp: int = 1, model: ModelSpec = TINY) -> Site:
    layout = Layout(tp=tp, pp=pp, layers_per_stage=(model.layers // pp,) * pp)
    context = StageContext(model=model, layout=layout, stage=stage, adapters=(("a", LoRA(rank=2)), ("b", LoRA(rank=4))))
    return Site(context=context, device=device, link=LINK if tp > 1 else None)


def batch(htask: int, task: str, rows: int = 2, length: int = 8) -> Batch:
    made = [
        Row(task=task, slot=i, sample=i, prompt_tokens=length - 1, response_tokens=1, length_tokens=length)
        for i in range(rows)
    ]
    return Batch(htask=htask, rows=tuple(made))


def launch_all(place: Site, htasks: Sequence[int], way: Any = "forward") -> tuple[Launch, ...]:
    return tuple(
        Launch(htask=h, subgraph=s.index, stream="comm" if s.kind == "collective" else "compute")
        for h in htasks
        for s in stage_subgraphs(place.context.layout, place.context.stage, way)
    )


def count(place: Site, found: Batch) -> tuple[int, int, int]:
    """(subgraphs, compute operators, collectives) of a forward."""
    groups = subgraph_ops(place.context, found, "forward")
    collectives = sum(op.family == "all_reduce" for group in groups for op in group)
    return len(groups), sum(map(len, groups)) - collectives, collectives


def test_on_a_cpu_host_and_collectives_take_compute_time() -> None:
    for tp in (1, 2):
        place = site(CPU, tp)
        found = stage_run(Formula(), place, [batch(0, "a")], "forward", launch_all(place, [0]), run_blocks)
        launches, operators, collectives = count(place, batch(0, "a"))
        assert found.duration_ns == 20 * launches + (7 + 3) * operators + 40 * collectives
        assert found.host_bound_ns == 0
        assert found.exposed_ns == (20 + 40) * collectives
        assert [s.stream for s in found.spans].count("comm") == collectives


def test_host_bound_stage_on_a_gpu_by_hand() -> None:
    # 100 of host for 7 of device time, operator by operator.
    class Slow(Formula):
        def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
            return Cost(p50_ns=20) if op.family == "launch" else Cost(p50_ns=7, host_ns=100)

    place = site(GPU)
    found = stage_run(Slow(), place, [batch(0, "a")], "forward", launch_all(place, [0]), run_blocks)
    launches, operators, _ = count(place, batch(0, "a"))
    # The host never waits; the last kernel starts when it is issued.
    assert found.duration_ns == 20 * launches + 100 * operators + 7
    # Stalls are all the compute stream does not work.
    assert found.host_bound_ns == found.duration_ns - 7 * operators


def test_device_bound_stage_on_a_gpu_by_hand() -> None:
    class Fast(Formula):
        def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
            return Cost(p50_ns=20) if op.family == "launch" else Cost(p50_ns=1000, host_ns=3)

    place = site(GPU)
    found = stage_run(Fast(), place, [batch(0, "a")], "forward", launch_all(place, [0]), run_blocks)
    _, operators, _ = count(place, batch(0, "a"))
    assert found.duration_ns == 20 + 3 + 1000 * operators
    assert found.host_bound_ns == 20 + 3


def kernel_by_kernel_ns(place: Site, batches: Sequence[Batch], launches: Sequence[Launch], cost: Any, way: Any) -> int:
    """The same clock, one kernel at a time: each starts when issued, its stream free, and its hTask's last one done."""
    groups = {b.htask: subgraph_ops(place.context, b, way) for b in batches}
    host = 0
    free = {"compute": 0, "comm": 0}
    ready = dict.fromkeys(groups, 0)
    for launch in launches:
        host += 20
        if not groups[launch.htask][launch.subgraph]:  # nothing to compute, but it takes its turn on the stream
            free[launch.stream] = ready[launch.htask] = max(host, free[launch.stream], ready[launch.htask])
        for op in groups[launch.htask][launch.subgraph]:
            collective = op.family == "all_reduce"
            price = cost.link_latency(op, LINK) if collective else cost.latency(op, place.device)
            host += price.host_ns
            end = max(host, free[launch.stream], ready[launch.htask]) + price.p50_ns
            free[launch.stream] = ready[launch.htask] = end
    return max(free.values())


@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.sampled_from(("forward", "backward")),
    st.randoms(use_true_random=False),
)
def test_blocks_sum_up_kernels_exactly(host_ns: int, device_ns: int, way: Any, random: Any) -> None:
    class Varied(Formula):
        def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
            return (
                Cost(p50_ns=20) if op.family == "launch" else Cost(p50_ns=device_ns * len(op.family), host_ns=host_ns)
            )

    place = site(GPU, tp=2)
    batches = [batch(0, "a"), batch(1, "b", rows=1)]
    queues = {h: list(launch_all(place, [h], way)) for h in (0, 1)}
    launches = []
    while any(queues.values()):
        launches.append(queues[random.choice([h for h in queues if queues[h]])].pop(0))
    found = stage_run(Varied(), place, batches, way, launches, run_blocks)
    assert found.duration_ns == kernel_by_kernel_ns(place, batches, launches, Varied(), way)


def test_htasks_without_rows_are_skipped() -> None:
    place = site(CPU)
    both = launch_all(place, [0, 1])
    alone = stage_run(Formula(), place, [batch(1, "b")], "forward", both, run_blocks)
    assert {s.htask for s in alone.spans} == {1}
    assert (
        alone.duration_ns
        == stage_run(Formula(), place, [batch(1, "b")], "forward", launch_all(place, [1]), run_blocks).duration_ns
    )


def test_costs_are_summed_by_family() -> None:
    place = site(GPU, tp=2)
    found = stage_run(Formula(), place, [batch(0, "a")], "forward", launch_all(place, [0]), run_blocks)
    launches, operators, collectives = count(place, batch(0, "a"))
    assert found.costs.p50_ns == 20 * launches + 7 * operators + 40 * collectives
    assert found.costs.host_ns == 3 * operators
    assert found.costs.extrapolated_ns == 40 * collectives
    assert found.costs.joules == pytest.approx(operators)
    errors = dict(found.costs.error_ns)
    assert errors["launch"] == errors["all_reduce"] == 0.0
    assert sum(errors.values()) == pytest.approx(0.5 * (7 + 3) * operators)


def test_interleaving_two_htasks_hides_their_collectives() -> None:
    place = site(GPU, tp=2, pp=8, model=model_preset("llama2-7b"))
    batches = [batch(0, "a", 8, 128), batch(1, "b", 8, 128)]
    serial = launch_all(place, [0, 1])
    turns = tuple(x for pair in zip(launch_all(place, [0]), launch_all(place, [1]), strict=True) for x in pair)
    slow = stage_run(Roofline(), place, batches, "forward", serial, run_blocks)
    fast = stage_run(Roofline(), place, batches, "forward", turns, run_blocks)
    assert fast.duration_ns < slow.duration_ns
    assert fast.exposed_ns < slow.exposed_ns


def test_cache_knows_shapes_not_names() -> None:
    cache = StageCache(Formula())
    place = site(CPU)
    launches = launch_all(place, [0])
    first = cache.run(place, [batch(0, "a")], "forward", launches)
    simulated = cache.simulated
    twin = StageContext(
        model=TINY, layout=place.context.layout, stage=0, adapters=(("other", LoRA(rank=2)), ("b", LoRA(rank=4)))
    )
    renamed = Site(context=twin, device=CPU)
    assert cache.run(renamed, [batch(0, "other")], "forward", launches) is first
    assert cache.simulated == simulated
    assert cache.run(renamed, [batch(0, "b")], "forward", launches) is not first
    assert cache.run(place, [batch(0, "a", 3)], "forward", launches) is not first
    assert cache.run(place, [batch(0, "a")], "backward", launch_all(place, [0], "backward")) is not first


def test_cached_runs_equal_fresh_ones_on_every_stage() -> None:
    cache = StageCache(Formula(), recur_blocks)
    for pp in (1, 2):
        for stage in range(pp):
            place = site(CPU, pp=pp, stage=stage)
            for way in WAYS:
                launches, batches = launch_all(place, [0], way), [batch(0, "a")]
                fresh = stage_run(Formula(), place, batches, way, launches, recur_blocks)
                found = [cache.run(place, batches, way, launches) for _ in range(2)]
                assert found == [fresh, fresh]
