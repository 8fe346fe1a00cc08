"""Objectives by hand, the pace of tasks, the slowdown cap, and the laws of the Pareto front."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.experiments.commands.pareto import Point, dominates, front, parse_pareto
from muxtune.experiments.main import main
from muxtune.policies.alone import Alone, with_slowdowns
from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.objectives.base import WORST, Goal, completion_ns, objectives, require_objective, values
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.estimate import Estimate, TaskStep
from muxtune.spec.layout import LayoutChoice, even_layout
from muxtune.spec.metrics import task_paces
from muxtune.spec.plan import Plan
from muxtune.spec.program import UnitKey
from muxtune.spec.task import Workload
from muxtune.spec.timeline import Span, Timeline
from tests.conftest import count_tokens_processed, make_hand_plan, make_state, make_workload

SECOND = 10**9


def workload(**more: Any) -> Workload:
    """a: 3 steps from the start, weight 2; b: 2 steps, arrives at 1 s; deadlines as given."""
    made = make_workload(2)
    a = replace(made.tasks[0], task_id="a", steps=3, weight=2.0, deadline_ns=more.get("a"))
    b = replace(made.tasks[1], task_id="b", steps=2, arrival_ns=SECOND, deadline_ns=more.get("b"))
    return replace(made, tasks=(a, b))


def estimate(**more: Any) -> Estimate:
    """An iteration of 10 s; a steps every 4 s, at 3 s of its iteration; b steps with the iteration."""
    plain = count_tokens_processed(make_hand_plan(make_state(), [["t0", "t1", "t2", "t3"]]))
    a = TaskStep(task="a", step_ns=2 * SECOND, slowdown=2.5, period_ns=4 * SECOND, end_ns=3 * SECOND)
    b = TaskStep(task="b", step_ns=2 * SECOND, slowdown=1.5)
    figures = {"iteration_ns": 10 * SECOND, "billed_tokens": 500, "energy_j": 1000.0, "per_task": (a, b)}
    return replace(plain, **(figures | more))


def test_values_by_hand() -> None:
    """Both start at 1 s: a ends at 1 + 2·4 + 3 = 12 s, b at 1 + 10 + 10 = 21 s."""
    found = estimate()
    assert completion_ns(workload(), found) == {"a": 12 * SECOND, "b": 21 * SECOND}
    assert values(workload(a=12 * SECOND, b=21 * SECOND - 1), found) == {
        "throughput": 50.0,
        "weighted-completion": (2 * 12 + 21) / 3,
        "worst-slowdown": 2.5,
        "energy-per-token": 2.0,
        "deadline-misses": 1.0,
    }
    assert require_objective("throughput").cost(workload(), found) == 10 * SECOND


def test_what_is_not_known_is_no_figure() -> None:
    bare = estimate(energy_j=None, per_task=(TaskStep(task="a", step_ns=1),))
    assert values(workload(), bare)["energy-per-token"] is None
    assert values(workload(), bare)["worst-slowdown"] is None
    goal = Goal(objective="energy-per-token")
    assert goal.rank(workload(), bare)[1] == WORST
    assert (
        goal.refusal(workload(), bare) == "objective energy-per-token: nothing is known of it under cost model tokens"
    )


def test_the_cap_comes_first_and_ties_go_to_the_faster_plan() -> None:
    slow, fast = estimate(), estimate(iteration_ns=9 * SECOND)
    assert Goal().rank(workload(), fast) < Goal().rank(workload(), slow)
    misses = Goal(objective="deadline-misses")
    assert misses.rank(workload(), fast) < misses.rank(workload(), slow)
    gentle = estimate(per_task=(TaskStep(task="a", step_ns=1, slowdown=1.0),))
    cap = Goal(max_slowdown=2.0)
    assert cap.rank(workload(), gentle) < cap.rank(workload(), fast)
    assert cap.refusal(workload(), gentle) is None
    told = cap.refusal(workload(), slow)
    assert told is not None
    assert told.startswith("task a is slowed 2.50x against running alone, --max-slowdown allows 2")
    with pytest.raises(ValueError, match="max_slowdown=0"):
        Goal(max_slowdown=0)


@given(order=st.permutations(range(8)))
def test_the_order_in_which_tasks_are_listed_changes_no_value(order: list[int]) -> None:
    made = make_workload(8)
    tasks = [replace(t, weight=0.1 + i / 7, steps=i + 1, deadline_ns=i * SECOND) for i, t in enumerate(made.tasks)]
    paces = tuple(TaskStep(task=t.task_id, step_ns=1, slowdown=1.0, period_ns=7, end_ns=5) for t in tasks)
    found = estimate(per_task=paces)
    turned = replace(made, tasks=tuple(tasks[i] for i in order))
    assert values(turned, found) == values(replace(made, tasks=tuple(tasks)), found)


def span(rank: int, instance: int, task: str, step: int, start: int, end: int) -> Span:
    key = UnitKey(step=step, instance=instance, bucket=0, unit=0)
    return Span(rank=rank, stream="compute", op="forward", index=0, key=key, tasks=(task,), start_ns=start, end_ns=end)


def test_instances_on_other_devices_keep_their_own_pace() -> None:
    """Rank 0: a, twice, a step each 10; rank 1: b and c in turn, a step each 25."""
    spans = [span(0, 0, "a", s, 10 * s, 10 * s + 10) for s in (0, 1)]
    spans += [span(1, 1, "b", s, 25 * s, 25 * s + 15) for s in (0, 1)]
    spans += [span(1, 2, "c", s, 25 * s + 15, 25 * s + 25) for s in (0, 1)]
    timeline = Timeline(source="sim", program_digest="x", seed=0, steps=2, spans=tuple(spans))
    [whole] = make_hand_plan(make_state(make_workload(1)), [["t0"]]).instances
    instances = [
        replace(whole, devices=(rank,), htasks=(replace(whole.htasks[0], tasks=(task,)),))
        for rank, task in ((0, "a"), (1, "b"), (1, "c"))
    ]
    paces = {p.task: (p.step_ns, p.period_ns, p.end_ns) for p in task_paces(timeline, instances)}
    assert paces == {"a": (10, 10, 10), "b": (15, 25, 15), "c": (10, 25, 25)}


def judged(state: SystemState, goal: Goal) -> SystemState:
    evaluate = make_evaluate(Roofline(), 0, 2)
    given = LayoutChoice(layout=state.layout, microbatches=state.microbatches)
    return replace(state, goal=goal, evaluate=with_slowdowns(evaluate, [given]) if goal.reads_slowdowns else evaluate)


@pytest.mark.parametrize("objective", ["weighted-completion", "worst-slowdown", "energy-per-token", "deadline-misses"])
def test_search_is_never_worse_than_its_starts_in_what_it_is_asked_for(objective: str) -> None:
    made = make_workload(3)
    tasks = tuple(replace(t, steps=2 + i, weight=1.0 + i, deadline_ns=10**6 * i) for i, t in enumerate(made.tasks))
    state = judged(
        make_state(replace(made, tasks=tasks), pp=2, microbatches=2, cluster="2xA40"), Goal(objective=objective)
    )
    assert state.evaluate is not None
    plan = make_policy("search:evaluations=24,alignment=pad", Roofline()).plan(state)
    best = state.rank(state.evaluate(plan))
    for name in ("muxtune", "greedy", "ilp", "hf-peft", "nemo"):
        assert best <= state.rank(state.evaluate(make_policy(name, Roofline()).plan(state))), name
    assert plan.made_by.solver is not None
    assert f"({objective} " in plan.made_by.solver.status


def test_slowdown_is_against_the_best_that_a_task_may_have_alone() -> None:
    """The reference does not move with the plan's layout: a slow layout is no excuse."""
    state = make_state(make_workload(1), cluster="2xA40", microbatches=2)
    evaluate = make_evaluate(Roofline(), 0)
    plans = {
        pp: make_policy("hf-peft", Roofline()).plan(replace(state, layout=even_layout(state.workload.model, pp=pp)))
        for pp in (1, 2)
    }
    times = {pp: evaluate(plan).iteration_ns for pp, plan in plans.items()}
    choices = [LayoutChoice(layout=even_layout(state.workload.model, pp=pp), microbatches=2) for pp in (1, 2)]
    for pp, plan in plans.items():
        assert slowdown(Alone(evaluate), plan) == 1.0
        assert slowdown(Alone(evaluate, choices), plan) == times[pp] / min(times.values())


def slowdown(alone: Alone, plan: Plan) -> float | None:
    return alone.slowdowns(plan, alone.evaluate(plan)).per_task[0].slowdown


COSTS = st.one_of(st.none(), st.tuples(st.integers(0, 5), st.integers(0, 5)))


@given(points=st.lists(COSTS, max_size=12))
def test_the_front_has_no_dominated_point_and_dominates_all_others(points: list[Point]) -> None:
    found = front(points)
    marked = [p for p, (best, _) in zip(points, found, strict=True) if best]
    assert not any(dominates(p, q) for p in marked for q in marked)
    for point, (best, beaten) in zip(points, found, strict=True):
        if point is None:
            assert (best, beaten) == (False, None)
        elif best:
            assert beaten is None
        else:
            assert beaten is not None
            assert found[beaten][0]
            assert dominates(points[beaten], point)


def test_objectives_are_named_or_refused(tmp_path: Path) -> None:
    assert parse_pareto("throughput, energy-per-token") == ("throughput", "energy-per-token")
    assert parse_pareto("") == ()
    for wrong in ("throughput", "throughput,throughput", "throughput,energy-per-token,worst-slowdown"):
        with pytest.raises(InputError, match="give two different objectives"):
            parse_pareto(wrong)
    with pytest.raises(UnknownKeyError, match=r"unknown objective 'speed': known are deadline-misses, energy"):
        require_objective("speed")
    guide = (Path(__file__).parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- example: objective -->\n```python\n(.*?)```", guide, re.DOTALL)
    assert shown is not None
    own = tmp_path / "mine.py"
    own.write_text(shown.group(1))
    found = values(workload(), estimate(peak_bytes=(3, 5)), [f"{own}:Peak"])
    assert found[f"{own}:Peak"] == 5.0
    assert set(objectives()) < set(found)
    assert all(f"| `{name}`" in guide for name in objectives())


WORK = """
model: tiny-gpt2
tasks:
  - {task_id: a, dataset: sst2, global_batch_samples: 4, peft: {kind: lora, rank: 8}, steps: 5, deadline_s: 0.001}
  - {task_id: b, dataset: rte, global_batch_samples: 2, peft: {kind: lora, rank: 8}, steps: 50, weight: 3}
"""


def test_the_commands_rank_cap_and_mark(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("work.yaml").write_text(WORK)
    common = ["--workload", "work.yaml", "--cluster", "2xA40"]
    asked = ["--objective", "weighted-completion", "--pareto", "weighted-completion,energy-per-token"]
    assert main(["compare", *common, *asked, "--policies", "hf-peft,nemo,muxtune", "--out", "out", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    rows = body["rows"]
    reached = [r["objectives"]["weighted-completion"] for r in rows]
    assert reached == sorted(reached)
    assert body["best"] == rows[0]["policy"]
    assert body["pareto"]["front"] == [r["policy"] for r in rows if r["pareto"]]
    assert body["best"] in body["pareto"]["front"]
    assert all(r["pareto"] or r["dominated_by"] in body["pareto"]["front"] for r in rows)
    assert Path("out/pareto.svg").read_text().startswith("<svg")
    searched = ["--search-layout", "--microbatches", "1,2", "--objective", "worst-slowdown", "--policies", "muxtune"]
    assert main(["compare", *common, *searched]) == 0
    shown = capsys.readouterr().out
    assert "* best by worst-slowdown" in shown
    assert "tp=1 pp=1 dp=1 C=" in shown or "pp=2 dp=1 C=" in shown or "dp=2 C=" in shown
    assert main(["plan", *common, "--policy", "hf-peft", "--max-slowdown", "1.01"]) == 1
    assert "is slowed" in capsys.readouterr().err
    assert not Path("plan.json").exists()
    assert main(["compare", *common, "--policies", "hf-peft", "--max-slowdown", "1.01"]) == 1
    assert "hf-peft: no plan: policy hf-peft: task" in capsys.readouterr().out
    assert main(["plan", *common, "--policy", "hf-peft", "--objective", "speed"]) == 2
    assert main(["plan", *common, "--policy", "hf-peft", "--max-slowdown", "-1"]) == 2
