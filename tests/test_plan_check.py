"""check: every way in which a plan or a program cannot be executed is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muxtune.spec.bind import bind, serial_launches, stage_orders
from muxtune.spec.check import check, check_program, require_valid
from muxtune.spec.errors import PlanError
from muxtune.spec.memory import rank_peaks
from muxtune.spec.plan import Action, Bucket, Instance, Launch, LaunchList, Part, Plan, StageOrder, Unit
from muxtune.spec.units import format_bytes


@pytest.fixture
def plan(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> Plan:
    """Tasks t0 and t1, 2 and 3 samples, an hTask and a bucket each, two stages, C=2."""
    found: Plan = hand_plan(tiny_state(tiny_workload(2), pp=2), [["t0"], ["t1"]])
    assert check(found) == ()
    return found


def changed(plan: Plan, **changes: Any) -> Plan:
    """The plan with changes to its only instance."""
    return replace(plan, instances=(replace(plan.instances[0], **changes),))


def only(problems: tuple[str, ...]) -> str:
    (problem,) = problems
    return problem


def unit(*slots: int, task: str = "t0", htask: int = 0) -> Unit:
    return Unit(parts=(Part(htask=htask, task=task, slots=slots),))


def with_units(plan: Plan, *units: Unit) -> Plan:
    """The plan with other units in bucket 0 (task t0, slots 0 and 1)."""
    buckets = (replace(plan.instances[0].buckets[0], units=units), plan.instances[0].buckets[1])
    return changed(plan, buckets=buckets)


def orders(*stages: str) -> tuple[StageOrder, ...]:
    """Explicit orders of bucket 0: `F0 B0 S` with S the step of t0."""
    made = []
    for stage, text in enumerate(stages):
        actions = []
        for word in text.split():
            if word[0] == "S":
                actions.append(Action(op="step", task=word[1:] or "t0"))
            else:
                actions.append(Action(op="forward" if word[0] == "F" else "backward", bucket=0, unit=int(word[1:])))
        made.append(StageOrder(stage=stage, actions=tuple(actions)))
    return tuple(made)


@pytest.fixture
def explicit(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> Any:
    """Factory: one task, two stages, two units, with explicit orders."""
    base = hand_plan(tiny_state(tiny_workload(1), pp=2), [["t0"]])
    return lambda *stages: changed(base, order="explicit", orders=orders(*stages))


class TestTasks:
    def test_left_out(self, plan: Plan) -> None:
        without = changed(plan, htasks=plan.instances[0].htasks[:1], buckets=plan.instances[0].buckets[:1])
        assert only(check(without)) == "task t1 is in no hTask: place it in one"

    def test_placed_twice(self, plan: Plan) -> None:
        twice = replace(plan, instances=plan.instances * 2)
        assert "task t0 is placed 2 times: place it in one hTask only" in check(twice)

    def test_unknown(self, plan: Plan) -> None:
        smaller = replace(plan, workload=replace(plan.workload, tasks=plan.workload.tasks[:1]))
        assert "task t1 is placed but not in the workload" in check(smaller)

    def test_the_file_is_named(self, plan: Plan) -> None:
        with pytest.raises(PlanError, match=r"^mine\.json: instance .*microbatches=0"):
            require_valid(changed(plan, microbatches=0), source="mine.json")

    def test_all_problems_in_one_error(self, plan: Plan) -> None:
        with pytest.raises(PlanError, match=r"task t0 is placed 2 times.*; task t1 is placed 2 times"):
            require_valid(replace(plan, instances=plan.instances * 2))


class TestStructure:
    def test_htask_in_no_bucket_or_in_two(self, plan: Plan) -> None:
        first, second = plan.instances[0].buckets
        assert any("hTask 1 is in 0 buckets" in p for p in check(changed(plan, buckets=(first,))))
        assert any("hTask 1 is in 2 buckets" in p for p in check(changed(plan, buckets=(first, second, second))))

    def test_bucket_of_an_htask_that_is_not_there(self, plan: Plan) -> None:
        extra = Bucket(htasks=(5,), units=())
        buckets = (*plan.instances[0].buckets, extra)
        assert any("names hTask 5, but there are only 2" in p for p in check(changed(plan, buckets=buckets)))

    def test_part_in_a_foreign_htask(self, plan: Plan) -> None:
        problems = check(with_units(plan, unit(0, htask=1), unit(1)))
        assert any("names hTask 1, which is not in that bucket" in p for p in problems)
        problems = check(with_units(plan, unit(0), unit(1), unit(0, task="t1")))
        assert any("runs task t1 in hTask 0, which does not hold it" in p for p in problems)


class TestSlots:
    def test_missing(self, plan: Plan) -> None:
        assert only(check(with_units(plan, unit(0)))).endswith("slots [1] are in no unit and [] in several")

    def test_duplicated(self, plan: Plan) -> None:
        problem = only(check(with_units(plan, unit(0, 1), unit(1))))
        assert problem == "instance shared: task t0: sample slots [] are in no unit and [1] in several"

    def test_beyond_the_global_batch(self, plan: Plan) -> None:
        assert "slot 2 of task t0 is beyond" in only(check(with_units(plan, unit(0), unit(1, 2))))

    def test_empty_unit(self, plan: Plan) -> None:
        assert "unit 2 of bucket 0 has no samples" in only(check(with_units(plan, unit(0), unit(1), unit())))


class TestDevices:
    @pytest.mark.parametrize("devices", [(0,), (0, 0), (0, 1, 2)])
    def test_wrong_number(self, plan: Plan, devices: tuple[int, ...]) -> None:
        assert "must be 2 different devices" in only(check(changed(plan, devices=devices)))

    def test_not_in_the_cluster(self, plan: Plan) -> None:
        assert only(check(changed(plan, devices=(0, 4)))).endswith("device 4 is not in cluster 4xcpu of 4")

    def test_layers_do_not_add_up(self, plan: Plan) -> None:
        layout = replace(plan.instances[0].layout, layers_per_stage=(2, 1))
        assert "layers_per_stage sums to 3, model tiny-llama has 4" in only(check(changed(plan, layout=layout)))

    def test_tp_must_divide(self, plan: Plan) -> None:
        layout = replace(plan.instances[0].layout, tp=4, pp=1, layers_per_stage=(4,))
        problems = check(changed(plan, layout=layout, devices=(0, 1, 2, 3)))
        assert [p.partition("divide ")[2] for p in problems] == ["heads=6 of tiny-llama", "kv_heads=2 of tiny-llama"]

    def test_a_replica_that_misses_a_unit_is_named(self, plan: Plan) -> None:
        wide = changed(plan, layout=replace(plan.instances[0].layout, dp=2), devices=(0, 1, 2, 3))
        assert check(wide) == ()
        orders = tuple(
            StageOrder(stage=s, actions=a.actions + b.actions)
            for s, (a, b) in enumerate(
                zip(stage_orders(wide.instances[0], 0), stage_orders(wide.instances[0], 1), strict=True)
            )
        )
        steps_once = tuple(
            replace(o, actions=tuple(a for a in o.actions if a.op != "step") + o.actions[-2:]) for o in orders
        )
        explicit = changed(wide, order="explicit", orders=steps_once)
        assert check(explicit) == ()
        short = tuple(
            replace(o, actions=tuple(a for a in o.actions if (a.op, a.bucket, a.unit) != ("backward", 1, 1)))
            for o in steps_once
        )
        assert [p for p in check(changed(wide, order="explicit", orders=short)) if "never runs" in p] == [
            f"instance shared: stage {s} never runs the backward of unit 1 of bucket 1 (step 0)" for s in (0, 1)
        ]

    def test_instances_have_names_and_tasks(self, plan: Plan) -> None:
        (instance,) = plan.instances
        idle = replace(instance, name="idle", htasks=(), buckets=())
        assert only(check(replace(plan, instances=(instance, idle)))) == (
            "instance idle has no tasks: give it some or leave it out"
        )
        twins = check(replace(plan, instances=(instance, instance)))
        assert f"2 instances are named {instance.name!r}: give each a name of its own" in twins
        nothing = check(replace(plan, instances=()))
        assert "the plan has no instances: give it at least one" in nothing

    def test_no_microbatches(self, plan: Plan) -> None:
        assert only(check(changed(plan, microbatches=0))).endswith("microbatches=0: must be at least 1")


class TestOrders:
    def test_good(self, explicit: Any) -> None:
        assert check(explicit("F0 F1 B0 B1", "F0 B0 F1 B1 S")) != ()
        assert check(explicit("F0 F1 B0 B1 S", "F0 B0 F1 B1 S")) == ()
        assert check(explicit("F0 F1 B0 B1", "F0 B0 F1 B1")) == ()

    def test_backward_before_forward(self, explicit: Any) -> None:
        problems = check(explicit("F0 B1 F1 B0", "F0 B0 F1 B1"))
        assert only(problems) == "instance shared: stage 0: backward of unit 1 of bucket 0 stands before its forward"

    def test_missing_and_repeated(self, explicit: Any) -> None:
        assert "stage 1 never runs the backward of unit 1" in only(check(explicit("F0 F1 B0 B1", "F0 B0 F1")))
        assert "stage 0 runs the forward of unit 0 of bucket 0 (step 0) 2 times" in "; ".join(
            check(explicit("F0 F0 F1 B0 B1", "F0 B0 F1 B1"))
        )
        assert "stage 0 runs the forward of unit 7" in "; ".join(check(explicit("F0 F1 F7 B0 B1", "F0 B0 F1 B1")))

    def test_stages(self, explicit: Any) -> None:
        assert "orders are for stages [0], expected one for each of 0..1" in only(check(explicit("F0 F1 B0 B1")))

    def test_steps(self, explicit: Any) -> None:
        early = "step 0 of task t0 stands before one of its backwards"
        assert early in only(check(explicit("F0 F1 B0 S B1", "F0 B0 F1 B1 S")))
        assert "stage 0: task t0 steps 2 times" in only(check(explicit("F0 F1 B0 B1 S S", "F0 B0 F1 B1 S")))
        assert "steps task ghost, which the instance does not hold" in only(
            check(explicit("F0 F1 B0 B1 S Sghost", "F0 B0 F1 B1 S"))
        )

    def test_next_step_must_wait(self, explicit: Any) -> None:
        base = explicit("F0 F1 B0 B1", "F0 B0 F1 B1")
        actions = stage_orders(base.instances[0])[0].actions
        second = [replace(a, step=1) for a in actions]
        good = (*actions, *second)
        bad = (*actions[:-1], second[0], actions[-1], *second[1:])
        for made, problem in ((good, None), (bad, "a forward of task t0 of step 1 stands before step 0")):
            stages = tuple(StageOrder(stage=s, actions=made) for s in (0, 1))
            problems = check(changed(base, orders=stages, steps=2))
            assert problems == () if problem is None else any(problem in p for p in problems)

    def test_feed(self, plan: Plan) -> None:
        assert "feed must name each of the 4 units" in only(check(changed(plan, feed=((0, 0), (0, 0), (0, 1), (1, 0)))))
        assert check(changed(plan, feed=((1, 1), (0, 1), (1, 0), (0, 0)))) == ()

    def test_deadlock_is_named(self, explicit: Any) -> None:
        """Stage 0 wants the gradient of 0 before it sends 1; stage 1 wants 1 before it turns 0 around."""
        problem = only(check(explicit("F0 B0 F1 B1", "F0 F1 B0 B1")))
        assert problem == (
            "the order deadlocks: rank 0 at instruction 2 (recv gradient of bucket 0 unit 0) waits for rank 1, "
            "rank 1 at instruction 2 (recv activation of bucket 0 unit 1) waits for rank 0"
        )

    def test_channels_are_fifo(self, explicit: Any) -> None:
        problems = check(explicit("F0 F1 B0 B1", "F1 B1 F0 B0"))
        assert problems == (
            "channel 0→1 (activation): messages are sent in another order than they are received",
            "channel 1→0 (gradient): messages are sent in another order than they are received",
        )

    def test_instances_of_different_step_counts(self, tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> None:
        """Orders over 2 and 3 steps are checked over 6."""
        state = tiny_state(tiny_workload(2, samples=(1,)))
        both = hand_plan(state, [["t0"], ["t1"]]).instances[0]
        instances = []
        for h, steps in enumerate((2, 3)):
            one = [Action(op=op, bucket=0, unit=0) for op in ("forward", "backward")]
            one.append(Action(op="step", task=f"t{h}"))
            order = StageOrder(stage=0, actions=tuple(replace(a, step=s) for s in range(steps) for a in one))
            bucket = Bucket(htasks=(0,), units=(unit(0, task=f"t{h}"),))
            changes = {"htasks": both.htasks[h : h + 1], "buckets": (bucket,), "orders": (order,)}
            instances.append(replace(both, name=f"i{h}", order="explicit", steps=steps, **changes))
        assert check(Plan(workload=state.workload, cluster=state.cluster, instances=tuple(instances))) == ()


class TestLaunches:
    @pytest.fixture
    def sharded(self, tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> Plan:
        """Two hTasks in one bucket, tp=2, with the serial launch lists stated."""
        plan: Plan = hand_plan(tiny_state(tiny_workload(2), tp=2), [["t0"], ["t1"]], [[0, 1]])
        lists = tuple(serial_launches(plan.instances[0], plan.instances[0].buckets[0], 0))
        return self.launched(plan, lists)

    @staticmethod
    def launched(plan: Plan, lists: tuple[LaunchList, ...]) -> Plan:
        return changed(plan, buckets=(replace(plan.instances[0].buckets[0], launches=lists),))

    def lists(self, plan: Plan) -> tuple[LaunchList, ...]:
        return plan.instances[0].buckets[0].launches

    def test_serial_and_interleaved_are_good(self, sharded: Plan) -> None:
        assert check(sharded) == ()
        turns = []
        for x in self.lists(sharded):
            mine = [[y for y in x.launches if y.htask == h] for h in (0, 1)]
            turns.append(replace(x, launches=tuple(y for pair in zip(*mine, strict=True) for y in pair)))
        assert check(self.launched(sharded, tuple(turns))) == ()

    def test_incomplete_or_out_of_order(self, sharded: Plan) -> None:
        first, second = self.lists(sharded)
        missing = replace(first, launches=first.launches[1:])
        assert "hTask 0 must launch subgraphs" in only(check(self.launched(sharded, (missing, second))))
        swapped = replace(second, launches=(second.launches[1], second.launches[0], *second.launches[2:]))
        assert "backward: hTask 0 must launch subgraphs" in only(check(self.launched(sharded, (first, swapped))))

    def test_streams(self, sharded: Plan) -> None:
        first, second = self.lists(sharded)
        wrong = tuple(replace(x, stream="compute") for x in first.launches)
        problems = check(self.launched(sharded, (replace(first, launches=wrong), second)))
        assert all("collectives go on comm, all else on compute" in p for p in problems)
        assert len(problems) == 2

    def test_two_lists_for_one_clock(self, sharded: Plan) -> None:
        bucket = sharded.instances[0].buckets[0]
        twice = replace(bucket, launches=(*bucket.launches, bucket.launches[0]))
        assert "has 2 launch lists for stage 0" in only(check(changed(sharded, buckets=(twice,))))

    def test_foreign(self, sharded: Plan) -> None:
        first, second = self.lists(sharded)
        ghost = replace(first, launches=(*first.launches, Launch(htask=9, subgraph=0, stream="compute")))
        assert "names an hTask outside the bucket" in only(check(self.launched(sharded, (ghost, second))))
        away = replace(first, stage=3)
        assert "names a stage outside 0..0" in only(check(self.launched(sharded, (away, second))))


class TestMemory:
    def test_one_byte_short(self, plan: Plan) -> None:
        """Peaks differ between the ranks: with one byte less than the larger one, that rank is refused and no other."""
        peaks = sorted(rank_peaks(bind(plan, seed=0)), key=lambda p: p.peak_bytes)
        assert peaks[0].peak_bytes < peaks[1].peak_bytes
        assert check(self.limited(plan, peaks[1].peak_bytes)) == ()
        instruction = bind(plan, seed=0).program.ranks[peaks[1].rank].instructions[peaks[1].instruction]
        assert only(check(self.limited(plan, peaks[1].peak_bytes - 1))) == (
            f"rank {peaks[1].rank} does not fit: needs {format_bytes(peaks[1].peak_bytes)} during {instruction.op} of "
            f"bucket {instruction.key.bucket} unit {instruction.key.unit}, instruction {peaks[1].instruction} "
            f"({format_bytes(peaks[1].static_bytes)} of them static; {peaks[1].footprint.sentence()}), "
            f"cpu has {format_bytes(peaks[1].peak_bytes - 1)}"
        )

    @staticmethod
    def limited(plan: Plan, memory_bytes: int) -> Plan:
        device = replace(plan.cluster.device, memory_bytes=memory_bytes)
        return replace(plan, cluster=replace(plan.cluster, device=device))

    def test_static_bytes_alone(self, plan: Plan) -> None:
        problems = check(self.limited(plan, 2**20))
        assert [p.partition(":")[0] for p in problems] == ["rank 0 does not fit", "rank 1 does not fit"]


def test_instance_states_its_order_once(plan: Plan) -> None:
    with pytest.raises(ValueError, match="only `explicit` has them"):
        changed(plan, order="explicit")
    with pytest.raises(ValueError, match="only an explicit order covers several"):
        changed(plan, steps=2)
    assert isinstance(plan.instances[0], Instance)


def test_every_order_of_a_good_plan_passes(plan: Plan) -> None:
    for order in ("1f1b", "gpipe"):
        assert check_program(bind(changed(plan, order=order), seed=0, steps=2).program) == ()
