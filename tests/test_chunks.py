"""Chunks: packs and their cut, attention of the parts, programs and the pipeline law, memory, tokens, planners' figures."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.build import make_instance
from muxtune.policies.surrogate import Surrogate
from muxtune.sim.cost.base import Cost, stage_latency_ns
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.cost.table import Curve, Point, Table, fit_table
from muxtune.sim.pipeline import run_pipeline
from muxtune.sim.priced import price
from muxtune.sim.recurrence import recur
from muxtune.sim.simulate import estimate, simulate
from muxtune.sim.stage import StageCache
from muxtune.spec import ops
from muxtune.spec.align import chunk_rule, count_tokens, cut_packs, first_fit_decreasing, pack_length
from muxtune.spec.bind import bind, stage_orders
from muxtune.spec.check import check, check_program
from muxtune.spec.cluster import DeviceSpec, Link, device_presets
from muxtune.spec.errors import ExtrapolationError, PlanError
from muxtune.spec.files import read_noun, write_noun
from muxtune.spec.memory import MemoryWalk, rank_peaks
from muxtune.spec.ops import Op
from muxtune.spec.plan import Plan
from muxtune.spec.tensors import chunk_kv_bytes, held_bytes, working_bytes
from tests.test_spec_align import WL_A, WL_B, table2

T_NS = 1000


def test_the_papers_chunk_size() -> None:
    assert chunk_rule([64, 128, 256]) == 64
    assert chunk_rule([256, 768]) == 256
    assert chunk_rule([64, 100]) == 64  # 4 divides both, but 64 is the least
    assert chunk_rule([128]) == 128


def test_packs_by_hand() -> None:
    assert first_fit_decreasing([3, 5, 2, 4], 7) == ((1, 2), (3, 0))
    assert first_fit_decreasing([2, 2, 2], 4) == ((0, 1), (2,))
    assert first_fit_decreasing([], 4) == ()
    with pytest.raises(ValueError, match="a sequence of 5 tokens is longer than a pack of 4"):
        first_fit_decreasing([5], 4)


def pieces(lengths: list[int], longest: int, chunk: int) -> list[list[list[tuple[int, int, int, int]]]]:
    cut = cut_packs(lengths, longest, chunk)
    return [[[(p.sequence, p.past_tokens, p.tokens, p.padding_tokens) for p in pack] for pack in c] for c in cut]


def test_a_cut_by_hand() -> None:
    # Packs of 4 chunks: the sequence of 256, and the two of 128 one after the other.
    assert pieces([128, 256, 128], 256, 64) == [
        [[(1, 0, 64, 0)], [(0, 0, 64, 0)]],
        [[(1, 64, 64, 0)], [(0, 64, 64, 0)]],
        [[(1, 128, 64, 0)], [(2, 0, 64, 0)]],
        [[(1, 192, 64, 0)], [(2, 64, 64, 0)]],
    ]
    # 100 does not divide 150: the rest of its second chunk is padding, and the next sequence starts on a chunk.
    assert pieces([150, 50], 300, 100) == [[[(0, 0, 100, 0)]], [[(0, 100, 50, 50)]], [[(1, 0, 50, 50)]]]
    # One chunk covers the longest sequence: plain packing.
    assert pieces([64, 64, 64], 150, 150) == [[[(0, 0, 64, 0), (1, 0, 64, 22)], [(2, 0, 64, 86)]]]


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=9)


@given(LENGTHS, st.integers(1, 400), st.integers(0, 200))
def test_every_token_is_in_one_chunk_and_chunks_are_equal(lengths: list[int], chunk: int, more: int) -> None:
    longest = max(lengths) + more
    room = pack_length(longest, chunk)
    assert longest <= room < longest + chunk
    covered: dict[int, list[int]] = {i: [] for i in range(len(lengths))}
    counts = []
    for packs in cut_packs(lengths, longest, chunk):
        counts.append(len(packs))
        for pack in packs:
            assert sum(p.tokens + p.padding_tokens for p in pack) == chunk
            assert all(p.padding_tokens == 0 for p in pack[:-1])
            for p in pack:
                covered[p.sequence] += range(p.past_tokens, p.past_tokens + p.tokens)
    assert covered == {i: list(range(n)) for i, n in enumerate(lengths)}, "in order, each token once"
    assert len(counts) * chunk <= room
    assert counts == sorted(counts, reverse=True), "a pack that reaches chunk j + 1 reaches chunk j"


@given(LENGTHS, st.integers(1, 400), st.sampled_from(["forward", "backward"]))
def test_attention_of_the_chunks_is_that_of_the_sequence(lengths: list[int], chunk: int, direction: Any) -> None:
    """Σ q·(2·kv − q) = length²: exact with the convention that a token's attention to itself counts half."""
    found: Counter[int] = Counter()
    for packs in cut_packs(lengths, max(lengths), chunk):
        for p in (p for pack in packs for p in pack):
            op = ops.attention(1, p.past_tokens + p.tokens, (4, 2, 8), direction, "fp32", 4, p.tokens)
            found[p.sequence] += op.flops
    for i, n in enumerate(lengths):
        assert found[i] == ops.attention(1, n, (4, 2, 8), direction, "fp32", 4).flops


def test_attention_of_a_part_by_hand() -> None:
    # 2 rows, 3 heads of 8, 4 queries to 10 keys: pairs 4·10 − 4²/2 = 32, times 4 flops.
    op = ops.attention(2, 10, (3, 1, 8), "forward", "fp32", 4, 4)
    assert (op.flops, op.size) == (2 * 3 * 8 * 32 * 4, (2, 10, 4))
    # q and the output of 4 tokens, k and v of 10.
    assert op.moved_bytes == 2 * 8 * (2 * 3 * 4 + 2 * 1 * 10) * 4


def test_a_table_derives_parts_from_square_attention_only_if_allowed() -> None:
    cpu, heads = device_presets()["cpu"], (4, 2, 8)
    points = tuple(Point(size=(r, n), p50_ns=r * n * n, spread=0.1) for r in (1, 4) for n in (64, 256))
    curve = Curve(family="attention", direction="forward", dtype="fp32", shape=heads, points=points)
    fitted = fit_table([curve], cpu, 1_000_000)
    part = ops.attention(1, 256, heads, "forward", "fp32", 4, 64)
    with pytest.raises(ExtrapolationError, match="a chunk of 64 queries to 256 keys was not measured: profile again"):
        Table(fitted, cpu).latency(part, cpu)
    found = Table(fitted, cpu, allow_extrapolation=True).latency(part, cpu)
    assert (found.p50_ns, found.extrapolated) == (64 * (2 * 256 - 64), True)
    whole = ops.attention(1, 256, heads, "forward", "fp32", 4, 256)
    square = Table(fitted, cpu).latency(whole, cpu)
    assert (square.p50_ns, square.extrapolated, square.host_ns) == (256 * 256, False, found.host_ns)


@pytest.mark.parametrize(
    ("datasets", "count", "chunk", "effective", "chunked"),
    [
        (WL_A, 4, 0, 1280, 1280),
        (WL_A, 5, 0, 1792, 1792),
        (WL_A, 6, 0, 1920, 1920),
        (WL_A, 8, 0, 2944, 2944),
        (WL_B, 4, 128, 2432, 2816),
        (WL_B, 5, 128, 2944, 3840),
        (WL_B, 6, 128, 3456, 4352),
        (WL_B, 8, 128, 5504, 6400),
        (WL_B, 8, 0, 5504, 5504),  # the rule's 64 instead of the paper's deliberate 128
    ],
)
def test_table_2(datasets: tuple[str, ...], count: int, chunk: int, effective: int, chunked: int) -> None:
    """Effective and processed tokens of a micro-batch, all tasks in one hTask."""
    state = table2(datasets, count)
    everyone = [t.task_id for t in state.workload.tasks]
    instance = make_instance(state, "shared", [everyone], [[0]], "chunk", chunk)
    assert instance.htasks[0].chunk_tokens == (chunk or 64)
    plan = Plan(workload=state.workload, cluster=state.cluster, instances=(instance,))
    billed_len = [(t.task_id, t.billed_len_tokens) for t in state.workload.tasks]
    raw, billed, processed = count_tokens((b for w in bind(plan, seed=0).program.units for b in w.batches), billed_len)
    assert (billed, processed) == (effective, chunked)
    assert raw < billed
    padded = Plan(
        workload=state.workload,
        cluster=state.cluster,
        instances=(make_instance(state, "shared", [everyone], [[0]]),),
    )
    assert raw == count_tokens((b for w in bind(padded, seed=0).program.units for b in w.batches), billed_len)[0]


@given(seed=st.integers(0, 50), chunk=st.sampled_from([0, 16, 50, 64, 100, 256, 1000]), pp=st.integers(1, 3))
def test_every_token_of_every_sample_is_computed_once(
    seed: int, chunk: int, pp: int, tiny_state: Any, hand_plan: Any
) -> None:
    state = tiny_state(pp=pp)
    groups, buckets = [["t0", "t1"], ["t2"], ["t3"]], [[0, 1], [2]]
    flat = bind(hand_plan(state, groups, buckets, "varlen"), seed=seed).program
    wanted = {(r.task, r.slot): r for w in flat.units for b in w.batches for r in b.rows}
    instance = make_instance(state, "shared", groups, buckets, "chunk", chunk)
    plan = Plan(workload=state.workload, cluster=state.cluster, instances=(instance,))
    assert check(plan) == ()
    parts: dict[tuple[str, int], list[Any]] = {}
    for work in bind(plan, seed=seed).program.units:
        assert work.batches
        for batch in work.batches:
            assert batch.tokens % instance.htasks[batch.htask].chunk_tokens == 0
            for row in batch.rows:
                parts.setdefault((row.task, row.slot), []).append(row)
    assert set(parts) == set(wanted)
    for key, rows in parts.items():
        whole = wanted[key]
        assert {r.sample for r in rows} == {whole.sample}
        assert sum(r.prompt_tokens for r in rows) == whole.prompt_tokens
        assert sum(r.response_tokens for r in rows) == whole.response_tokens
        billed = state.workload.task(key[0]).billed_len_tokens
        reached = 0
        for r in rows:  # chunk after chunk, the prompt first
            assert r.past_tokens == reached
            assert r.prompt_tokens == max(0, min(whole.prompt_tokens, reached + r.length_tokens) - reached)
            reached += r.length_tokens - r.padding_tokens
        assert reached == billed


def chunked(
    state: SystemState, groups: list[list[str]], buckets: list[list[int]], chunk: int = 0, **changes: Any
) -> Plan:
    instance = make_instance(state, "shared", groups, buckets, "chunk", chunk)
    return Plan(workload=state.workload, cluster=state.cluster, instances=(dataclasses.replace(instance, **changes),))


@pytest.fixture
def four_chunks(tiny_state: Any, tiny_workload: Any) -> Plan:
    """Two stages, two micro-batches of one sequence of 256 in chunks of 64."""
    state = tiny_state(tiny_workload(1, datasets=("rte",), samples=(2,)), pp=2)
    return chunked(state, [["t0"]], [[0]], 64)


class Clock:
    """Every forward and backward takes T_NS (its instruction's host work), all else nothing."""

    model_id, calibrated = "clock", False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=T_NS if op.family == "instruction" else 0)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=0)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("packs", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_chunked_pipeline_law(stages: int, packs: int, k: int, tiny_state: Any, tiny_workload: Any) -> None:
    """U units of equal time t, K chunks a pack: exactly 2(S−1)t + 2Ut, in both engines."""
    workload = tiny_workload(1, datasets=("rte",), samples=(packs,))
    state = tiny_state(workload, pp=stages, microbatches=packs)
    plan = chunked(state, [["t0"]], [[0]], 256 // k)
    priced = price(bind(plan, seed=0), Clock(), StageCache(Clock()))
    times, _ = run_pipeline(priced)
    assert times == recur(priced)
    assert max(end for listing in times for _, end in listing) == 2 * (stages - 1) * T_NS + 2 * packs * k * T_NS


def test_program_of_chunks(four_chunks: Plan) -> None:
    """Messages and tags of each chunk; units of 64 tokens that look back at 0, 64, 128 and 192."""
    program = bind(four_chunks, seed=0).program
    assert [(w.key.unit, w.key.chunk, w.tokens) for w in program.units] == [
        (u, j, 64) for u in (0, 1) for j in range(4)
    ]
    assert [w.batches[0].attention_runs() for w in program.units[:4]] == [((1, 64 * j, 64),) for j in (1, 2, 3, 4)]
    tags = Counter((x.op, x.tag) for r in program.ranks for x in r.instructions if x.tag is not None)
    assert set(tags.values()) == {1}
    assert len(tags) == 2 * 2 * 8  # both ends, both directions, 8 chunks
    assert check_program(program) == ()


def test_a_plan_of_chunks_survives_its_file(four_chunks: Plan, tmp_path: Path) -> None:
    orders = stage_orders(four_chunks.instances[0])
    explicit = dataclasses.replace(four_chunks.instances[0], order="explicit", orders=orders)
    plan = dataclasses.replace(four_chunks, instances=(explicit,))
    write_noun(plan, tmp_path / "plan.json")
    assert read_noun(Plan, tmp_path / "plan.json") == plan
    assert bind(plan, seed=0).program.ranks == bind(four_chunks, seed=0).program.ranks


def reordered(plan: Plan, change: Any) -> Plan:
    """The plan with `change` made to the list of stage 1's actions."""
    orders = list(stage_orders(plan.instances[0]))
    actions = list(orders[1].actions)
    change(actions)
    orders[1] = dataclasses.replace(orders[1], actions=tuple(actions))
    explicit = dataclasses.replace(plan.instances[0], order="explicit", orders=tuple(orders))
    return dataclasses.replace(plan, instances=(explicit,))


def swap(op: str, first: int, second: int) -> Any:
    def change(actions: list[Any]) -> None:
        a, b = (
            next(i for i, x in enumerate(actions) if (x.op, x.unit, x.chunk) == (op, 0, j)) for j in (first, second)
        )
        actions[a], actions[b] = actions[b], actions[a]

    return change


def turn_early(actions: list[Any]) -> None:
    """Unit 0 turns back before its last forward."""
    place = next(i for i, x in enumerate(actions) if (x.op, x.unit, x.chunk) == ("forward", 0, 3))
    turn = next(i for i, x in enumerate(actions) if (x.op, x.unit, x.chunk) == ("backward", 0, 3))
    actions[place], actions[turn] = actions[turn], actions[place]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            swap("forward", 1, 2),
            "forward of chunk 2 of unit 0 of bucket 0 stands before that of chunk 1, whose KV it needs",
        ),
        (
            swap("backward", 1, 2),
            "backward of chunk 1 of unit 0 of bucket 0 stands before that of chunk 2, whose dKV it",
        ),
        (turn_early, "unit 0 of bucket 0 turns back with 3 of its 4 chunks in flight: it needs all 4"),
        (lambda actions: actions.pop(1), "stage 1 never runs the forward of chunk 1 of unit 0 of bucket 0 (step 0)"),
    ],
)
def test_orders_that_break_the_dependency_of_chunks(four_chunks: Plan, change: Any, problem: str) -> None:
    assert check(reordered(four_chunks, lambda actions: None)) == ()
    assert any(problem in found for found in check(reordered(four_chunks, change)))


def test_a_wrong_number_of_chunks_is_named(four_chunks: Plan) -> None:
    instance = four_chunks.instances[0]
    bucket = instance.buckets[0]
    units = (dataclasses.replace(bucket.units[0], chunks=3), bucket.units[1])
    wrong = dataclasses.replace(instance, buckets=(dataclasses.replace(bucket, units=units),))
    plan = dataclasses.replace(four_chunks, instances=(wrong,))
    assert check(plan) == ("instance shared: unit 0 of bucket 0 states 3 chunks, its packs have 4",)
    with pytest.raises(PlanError, match="unit 0 of bucket 0 states 3 chunks, its packs have 4"):
        bind(plan, seed=0)


def test_htasks_that_are_not_chunked_ride_in_chunk_0(tiny_state: Any) -> None:
    state = tiny_state()
    instance = make_instance(state, "shared", [["t0", "t1", "t2"], ["t3"]], [[0, 1]], "chunk", 64)
    padded = dataclasses.replace(instance.htasks[1], alignment="pad", chunk_tokens=0)
    instance = dataclasses.replace(instance, htasks=(instance.htasks[0], padded))
    plan = Plan(workload=state.workload, cluster=state.cluster, instances=(instance,))
    assert check(plan) == ()
    for work in bind(plan, seed=0).program.units:
        assert [b.htask for b in work.batches] == ([0, 1] if work.key.chunk == 0 else [0])


def test_memory_of_chunks_by_hand(four_chunks: Plan) -> None:
    """Stage 1 under 1F1B: 4 chunks of the first unit and 3 of the second are held when chunk 0 of the first turns back."""
    bound = bind(four_chunks, seed=0)
    walk = MemoryWalk(bound, 1)
    context = walk.context(0)
    batch = bound.program.units[0].batches[0]
    # tiny-llama: 2 KV heads of 32 on 2 layers, K and V in fp32 and dK and dV in fp32, 64 tokens.
    assert chunk_kv_bytes(context, batch) == 64 * 2 * (2 * 2 * 32) * (4 + 4)
    each = held_bytes(context, batch) + chunk_kv_bytes(context, batch)
    peak = max(walk.step(x)[0] for x in bound.program.ranks[1].instructions)
    assert peak == walk.static_bytes + 7 * each + working_bytes(context, batch)
    assert walk.in_use() == walk.static_bytes
    assert not any(walk.parts.values())
    # Plain packing keeps no KV for anybody.
    state = SystemState(
        workload=four_chunks.workload,
        cluster=four_chunks.cluster,
        layout=four_chunks.instances[0].layout,
        microbatches=2,
    )
    packed = MemoryWalk(bind(chunked(state, [["t0"]], [[0]], 256), seed=0), 1)
    whole = bind(chunked(state, [["t0"]], [[0]], 256), seed=0)
    packed.step(whole.program.ranks[1].instructions[0])
    packed.step(whole.program.ranks[1].instructions[1])
    first = whole.program.units[0]
    held = {key: kept.size_bytes for key, kept in packed.parts["activations"].items()}
    assert held == {first.key: held_bytes(context, first.batches[0])}
    assert not packed.parts["kv"]


PLANNED = ("muxtune:alignment=chunk", "muxtune:alignment=chunk,chunk=128", "greedy:alignment=chunk")


@pytest.mark.parametrize("reference", PLANNED)
def test_chunks_are_estimated_by_one_draw(reference: str, tiny_state: Any) -> None:
    plan = make_policy(reference, Roofline()).plan(tiny_state(pp=2))
    assert {h.alignment for h in plan.instances[0].htasks} == {"chunk"}
    found = estimate(plan, Roofline(), seed=0)
    assert (found.draws, found.spread) == (1, 0.0)
    other = estimate(plan, Roofline(), seed=7)
    assert (other.iteration_ns, other.billed_tokens, other.processed_tokens) == (
        found.iteration_ns,
        found.billed_tokens,
        found.processed_tokens,
    )
    assert found.raw_tokens < found.billed_tokens <= found.processed_tokens
    simulated = simulate(bind(plan, seed=0), Roofline())
    assert simulated.estimate == found
    assert {s.key.chunk for s in simulated.timeline.spans} > {0}
    assert (
        found.truncated_tokens
        == estimate(make_policy("sl-peft", Roofline()).plan(tiny_state(pp=2)), Roofline(), seed=0).truncated_tokens
    )


@dataclasses.dataclass(frozen=True)
class Uneven:
    """Every shape and direction has its own price."""

    model_id: str = "uneven"
    calibrated: bool = False

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        return Cost(p50_ns=op.flops % 9973 + sum(op.size) + len(op.family), host_ns=7)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=1)


@given(
    tasks=st.integers(1, 4),
    pp=st.integers(1, 4),
    microbatches=st.integers(1, 4),
    chunk=st.sampled_from([0, 64, 100, 512]),
)
@settings(max_examples=40)
def test_surrogate_prices_what_is_bound(
    tasks: int, pp: int, microbatches: int, chunk: int, tiny_state: Any, tiny_workload: Any
) -> None:
    """Latency of every chunk equal to the operator sum of its batch; the peak at least what 1F1B of the hTask walks."""
    state = tiny_state(tiny_workload(tasks), pp=pp, microbatches=microbatches)
    surrogate = Surrogate(Uneven(), state, "chunk", chunk)
    group = tuple(t.task_id for t in state.workload.tasks)
    bound = bind(chunked(state, [list(group)], [[0]], chunk), seed=0)
    for work in bound.program.units:
        found = surrogate.microbatch(group, work.key.unit, work.key.chunk)
        assert found is not None
        (batch,) = work.batches
        for stage, context in enumerate(surrogate.contexts):
            for direction, mine in (("forward", found.forward_ns), ("backward", found.backward_ns)):
                assert mine[stage] == stage_latency_ns(Uneven(), state.cluster.device, context, batch, direction)  # type: ignore[arg-type]
    assert surrogate.microbatch(group, 0, surrogate.chunks(group)) is None
    for peak in rank_peaks(bound):
        assert peak.peak_bytes <= surrogate.peak_bytes(group, peak.rank)


@pytest.mark.parametrize("packs", [1, 2, 6])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_peak_of_equal_chunks_is_what_check_finds(packs: int, pp: int, tiny_state: Any, tiny_workload: Any) -> None:
    state = tiny_state(tiny_workload(1, datasets=("rte",), samples=(packs,)), pp=pp, microbatches=packs)
    surrogate = Surrogate(Roofline(), state, "chunk", 64)
    walked = [p.peak_bytes for p in rank_peaks(bind(chunked(state, [["t0"]], [[0]], 64), seed=0))]
    assert [surrogate.peak_bytes(("t0",), s) for s in range(pp)] == walked
