"""bind: draws, instruction lists by hand, digests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muxtune.spec.bind import bind, stage_orders
from muxtune.spec.draw import draw_samples
from muxtune.spec.errors import PlanError
from muxtune.spec.noun import digest
from muxtune.spec.plan import Action, MadeBy, Provenance, StageOrder
from muxtune.spec.program import Instruction


def spelled(x: Instruction) -> str:
    """An instruction as text: forward 0.1, send activation 0.1 →1, step t0."""
    if x.op == "step":
        return f"step {x.task}"
    unit = f"{x.key.bucket}.{x.key.unit}"
    return f"{x.op} {x.payload} {unit} ~{x.peer}" if x.peer is not None else f"{x.op} {unit}"


@pytest.fixture
def two_by_two(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> Any:
    """One hTask of one task, two stages, two units of two samples."""
    state = tiny_state(tiny_workload(1, samples=(4,)), pp=2, microbatches=2)
    return hand_plan(state, [["t0"]])


def test_instructions_by_hand(two_by_two: Any) -> None:
    program = bind(two_by_two, seed=0).program
    lists = {r.rank: [spelled(x) for x in r.instructions] for r in program.ranks}
    assert lists[0] == [
        "forward 0.0",
        "send activation 0.0 ~1",
        "forward 0.1",
        "send activation 0.1 ~1",
        "recv gradient 0.0 ~1",
        "backward 0.0",
        "recv gradient 0.1 ~1",
        "backward 0.1",
        "step t0",
    ]
    assert lists[1] == [
        "recv activation 0.0 ~0",
        "forward 0.0",
        "backward 0.0",
        "send gradient 0.0 ~0",
        "recv activation 0.1 ~0",
        "forward 0.1",
        "backward 0.1",
        "send gradient 0.1 ~0",
        "step t0",
    ]


def test_message_size_by_hand(two_by_two: Any) -> None:
    # 2 samples padded to 64 tokens, hidden 192, fp32.
    sizes = {x.size_bytes for r in bind(two_by_two, seed=0).program.ranks for x in r.instructions if x.peer is not None}
    assert sizes == {2 * 64 * 192 * 4}


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (1, 4)])
def test_tags_pair_one_send_with_one_recv(tp: int, pp: int, tiny_state: Any, hand_plan: Any) -> None:
    state = tiny_state(tp=tp, pp=pp)
    program = bind(hand_plan(state, [["t0", "t1"], ["t2", "t3"]]), seed=0, steps=2).program
    ends: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for listing in program.ranks:
        for x in listing.instructions:
            if x.tag is not None and x.peer is not None:
                ends.setdefault((x.op, x.tag), []).append((listing.rank, x.peer))
    tags = {tag for _, tag in ends}
    # 2 steps · 2 buckets · 2 units · (S−1) boundaries · activation and gradient · tp lanes.
    assert len(tags) == 2 * 2 * 2 * (pp - 1) * 2 * tp
    for tag in tags:
        ((source, target),) = ends["send", tag]
        assert ends["recv", tag] == [(target, source)]


def test_units_hold_each_slot_once(tiny_state: Any, hand_plan: Any) -> None:
    plan = hand_plan(tiny_state(microbatches=3), [["t0", "t1"], ["t2", "t3"]], [[0, 1]])
    units = bind(plan, seed=0).program.units
    slots = sorted((r.task, r.slot) for w in units for b in w.batches for r in b.rows)
    assert slots == sorted((t.task_id, s) for t in plan.workload.tasks for s in range(t.global_batch_samples))
    for work in units:
        for batch in work.batches:
            assert [task for task, _, _ in batch.segments()] == sorted({r.task for r in batch.rows})


def test_an_htask_without_rows_has_no_batch(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> None:
    plan = hand_plan(tiny_state(tiny_workload(2, samples=(2, 1))), [["t0"], ["t1"]], [[0, 1]])
    assert [[b.htask for b in w.batches] for w in bind(plan, seed=0).program.units] == [[0, 1], [0]]


def test_steps_follow_the_last_backward_unless_placed(two_by_two: Any) -> None:
    instance = two_by_two.instances[0]
    assert [a.op for a in stage_orders(instance)[0].actions] == ["forward", "forward", "backward", "backward", "step"]
    orders = tuple(
        StageOrder(stage=o.stage, actions=(*o.actions[:-1], Action(op="step", task="t0")))
        for o in stage_orders(instance)
    )
    placed = replace(instance, order="explicit", orders=orders[::-1])
    assert stage_orders(placed) == orders


def test_several_steps_of_one_order(two_by_two: Any) -> None:
    once = bind(two_by_two, seed=0, steps=3).program
    assert len(once.units) == 3 * 2
    assert [x.key.step for x in once.ranks[0].instructions if x.op == "step"] == [0, 1, 2]
    actions = [replace(a, step=s) for s in (0, 1) for a in stage_orders(two_by_two.instances[0])[0].actions]
    both = tuple(StageOrder(stage=s, actions=tuple(actions)) for s in (0, 1))
    twice = replace(two_by_two, instances=(replace(two_by_two.instances[0], order="explicit", orders=both, steps=2),))
    assert [x.key.step for x in bind(twice, seed=0, steps=4).program.ranks[0].instructions if x.op == "step"] == [
        0,
        1,
        2,
        3,
    ]
    with pytest.raises(PlanError, match="covers 2 steps, which does not divide 3"):
        bind(twice, seed=0, steps=3)


def test_digest_depends_on_plan_seed_and_steps_only(two_by_two: Any) -> None:
    base = bind(two_by_two, seed=1).program.digest()
    assert bind(two_by_two, seed=1).program.digest() == base
    later = replace(two_by_two, provenance=Provenance(plan_seconds=3.0, created_utc="today"))
    assert bind(later, seed=1).program.digest() == base
    others = [bind(two_by_two, seed=2).program.digest(), bind(two_by_two, seed=1, steps=2).program.digest()]
    others.append(bind(replace(two_by_two, residency="swapped"), seed=1).program.digest())
    assert len({base, *others}) == 4


def test_the_decision_stands_in_the_program_not_its_maker(two_by_two: Any) -> None:
    signed = replace(two_by_two, made_by=MadeBy(policy="other"))
    assert digest(signed) != digest(two_by_two)
    assert bind(two_by_two, seed=0).program.plan_digest == signed.decision_digest()
    assert bind(two_by_two, seed=0).program == bind(signed, seed=0).program


def test_draws_do_not_depend_on_neighbours(tiny_workload: Any) -> None:
    many, one = tiny_workload(6), tiny_workload(6)
    alone = replace(one, tasks=one.tasks[2:3])
    turned = replace(many, tasks=many.tasks[::-1])
    wanted = draw_samples(many, seed=4, steps=2)
    for other in (alone, turned):
        drawn = draw_samples(other, seed=4, steps=2)
        assert all(drawn.of("t2", step) == wanted.of("t2", step) for step in (0, 1))


def test_draws_differ_by_seed_task_and_step_and_continue(tiny_workload: Any) -> None:
    workload = tiny_workload(2, datasets=("sst2",), samples=(16,))
    draw = draw_samples(workload, seed=4, steps=3)
    seen = [draw.of(t, s) for t in ("t0", "t1") for s in range(3)] + [draw_samples(workload, seed=5).of("t0", 0)]
    assert len(set(seen)) == len(seen)
    resumed = draw_samples(workload, seed=4, steps=1, first_step=2)
    assert resumed.of("t1", 2) == draw.of("t1", 2)
    with pytest.raises(KeyError):
        resumed.of("t1", 0)


def test_drawn_samples_are_of_the_data_set(tiny_workload: Any) -> None:
    workload = tiny_workload(1, samples=(500,))
    table = workload.datasets[0]
    for sample in draw_samples(workload, seed=0).of("t0", 0):
        assert 0 <= sample.sample < table.samples
        assert sample.response_tokens >= 1
        assert table.quantiles_tokens[0] <= sample.prompt_tokens + sample.response_tokens <= table.quantiles_tokens[-1]


def test_resumed_program_has_the_later_samples(two_by_two: Any) -> None:
    whole = bind(two_by_two, seed=3, steps=2).program
    second = bind(two_by_two, seed=3, steps=1, first_step=1).program
    assert [w.batches for w in second.units] == [w.batches for w in whole.units if w.key.step == 1]
