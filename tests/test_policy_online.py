"""Online planning: names and listing decide nothing, a cache changes nothing, a change is made only where it pays."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.experiments.main import main
from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.candidates import candidate_of
from muxtune.policies.objectives.base import Goal
from muxtune.policies.online.cache import PlanCache
from muxtune.policies.online.config import ReplanConfig
from muxtune.policies.online.decide import Answer
from muxtune.policies.online.grouping import NEW, Grouping, Placed
from muxtune.policies.online.question import renamed
from muxtune.policies.online.replan import Replan, replan
from muxtune.policies.surrogate import Surrogate, value_ns
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import make_evaluate
from muxtune.spec.check import check
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InfeasibleError, InputError
from muxtune.spec.model import model_preset
from muxtune.spec.plan import Plan
from muxtune.spec.task import Workload
from tests.conftest import make_state, make_workload, with_memory

COST = Roofline()
POLICY = make_policy("muxtune:charge=exact", COST)
#: Eight tasks of six types: t3 is like t0, t7 like t4.
ALL = make_workload(8, samples=(2, 4, 3, 2))
NEVER = ReplanConfig(replan_cost_ns=10**18)


def state_of(workload: Workload, **more: Any) -> SystemState:
    return replace(make_state(workload, pp=2, microbatches=2, cluster="4xA40", **more), evaluate=None)


def some(ids: Any) -> Workload:
    """The workload of some of the eight tasks, in the order given."""
    return replace(ALL, tasks=tuple(ALL.task(t) for t in ids))


def planned(workload: Workload, policy: Any = POLICY) -> Plan:
    plan: Plan = policy.plan(state_of(workload))
    return plan


def step(old: Plan | None, workload: Workload, config: ReplanConfig | None = None, **more: Any) -> Replan:
    return replan(POLICY, replace(state_of(workload), current=old, **more.pop("state", {})), config, **more)


def time_ns(plan: Plan) -> int:
    return make_evaluate(COST, 0)(plan).iteration_ns


SUBSETS = st.lists(st.sampled_from([t.task_id for t in ALL.tasks]), min_size=1, max_size=8, unique=True)


@given(old=SUBSETS, new=SUBSETS)
@settings(max_examples=15)
def test_any_change_gives_an_executable_plan_of_who_is_here(old: list[str], new: list[str]) -> None:
    found = step(planned(some(old)), some(new))
    assert check(found.plan) == ()
    assert found.plan.workload == some(new)
    assert sorted(t for i in found.plan.instances for t in i.tasks) == sorted(new)
    assert (found.arrived, found.left) == (tuple(sorted(set(new) - set(old))), tuple(sorted(set(old) - set(new))))
    assert found.plan.made_by.cost_model == "roofline"


@given(old=SUBSETS, new=SUBSETS, data=st.data())
@settings(max_examples=10)
def test_the_order_in_which_tasks_are_listed_changes_nothing(old: list[str], new: list[str], data: Any) -> None:
    first = step(planned(some(old)), some(new))
    turned = step(planned(some(old)), some(data.draw(st.permutations(new))))
    assert turned.plan.instances == first.plan.instances
    assert replace(turned, plan=first.plan) == first


@given(old=SUBSETS, new=SUBSETS, data=st.data())
@settings(max_examples=10)
def test_names_change_nothing_and_a_hit_is_what_a_miss_finds(old: list[str], new: list[str], data: Any) -> None:
    """Renaming is an isomorphism: what was found for some names is found again, from the cache, for any others."""
    everyone = [t.task_id for t in ALL.tasks]
    names = dict(zip(everyone, data.draw(st.permutations([f"n{i}" for i in range(8)])), strict=True))

    def other(workload: Workload) -> Workload:
        tasks = (replace(t, task_id=names[t.task_id], tenant="other", learning_rate=0.5) for t in workload.tasks)
        return replace(workload, name="other", tasks=tuple(tasks))

    cache = PlanCache[Answer]()
    plan = planned(some(old))
    first = step(plan, some(new), cache=cache)
    hit = step(renamed(plan, names, other(some(old))), other(some(new)), cache=cache)
    miss = step(renamed(plan, names, other(some(old))), other(some(new)))
    assert (cache.hits, cache.misses, len(cache)) == (1, 1, 1)
    assert (hit.cached, miss.cached, first.cached) == (True, False, False)
    assert replace(hit, cached=False) == miss
    assert time_ns(hit.plan) == time_ns(first.plan)
    assert hit.plan.workload == other(some(new))


def test_equal_tasks_get_equal_treatment() -> None:
    """t0 and t4 are made equal: whichever of them leaves, the plan of the other is the same."""
    twin = replace(ALL.task("t0"), task_id="t4")
    workload = replace(ALL, tasks=tuple(twin if t.task_id == "t4" else t for t in ALL.tasks))
    plan = POLICY.plan(state_of(workload))
    without = [replace(workload, tasks=tuple(t for t in workload.tasks if t.task_id != gone)) for gone in ("t0", "t4")]
    times = [time_ns(step(plan, w, ReplanConfig(full=True)).plan) for w in without]
    assert times[0] == times[1]


@pytest.mark.parametrize("gone", ["t0", "t3", "t7"])
def test_who_comes_and_goes_leaves_nothing_behind_where_changes_never_pay(gone: str) -> None:
    here = some([t.task_id for t in ALL.tasks if t.task_id != gone])
    plan = planned(here)
    came = step(plan, ALL, NEVER)
    went = step(came.plan, here, NEVER)
    assert came.kept
    assert went.kept
    assert came.moved == went.moved == ()
    first, last = candidate_of(plan), candidate_of(went.plan)
    assert first is not None
    assert last is not None
    assert {h for b in first.buckets for h in b} == {h for b in last.buckets for h in b}


@pytest.mark.parametrize("gone", ["t1", "t6"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2])
def test_who_comes_and_goes_costs_no_more_than_hysteresis_allows(gone: str, share: float) -> None:
    """A new plan of the policy is rejected only if it saves no more than this share of the horizon."""
    here = some([t.task_id for t in ALL.tasks if t.task_id != gone])
    config = ReplanConfig(full=True, horizon_ns=10**9, replan_cost_ns=round(share * 10**9))
    state = {"evaluate": make_evaluate(COST, 0)}
    plan = planned(here)
    went = step(step(plan, ALL, config, state=state).plan, here, config, state=state)
    assert time_ns(went.plan) * (1 - share) <= time_ns(plan) * (1 + 1e-9)


def test_a_change_is_made_where_it_saves_more_than_it_costs() -> None:
    """One hTask a task is what the plan in force has; the policy merges, which saves a known share of the horizon."""
    apart = planned(ALL, make_policy("muxtune:fusion=false", COST))
    free = step(apart, ALL, ReplanConfig(full=True))
    assert not free.kept
    assert free.before is not None
    assert free.after is not None
    assert free.reason.startswith(f"{100 * (1 - free.after / free.before):.2f} % better (throughput) saves")
    saved_ns = round((1 - free.after / free.before) * 10**9)
    for cost_ns, kept in ((saved_ns - 1, False), (saved_ns, True)):
        found = step(apart, ALL, ReplanConfig(full=True, horizon_ns=10**9, replan_cost_ns=cost_ns))
        assert found.kept == kept
        assert (found.plan.instances == apart.instances) == kept
    assert step(apart, ALL, NEVER).moved == ()
    assert free.moved


def test_improving_moves_lower_the_surrogate_and_are_bounded() -> None:
    apart = planned(ALL, make_policy("muxtune:fusion=false", COST))
    found = [step(apart, ALL, ReplanConfig(moves=m, groups=500)) for m in (0, 1, 2, 16)]
    values = [f.surrogate_after_ns for f in found if f.surrogate_after_ns is not None]
    assert len(values) == 4
    assert all(a >= b for a, b in pairwise(values))
    assert values[0] > values[3]
    assert [f.moves for f in found][1:3] == [1, 2]
    assert found[0].surrogate_before_ns == values[0]


@given(count=st.integers(1, 6), arriving=st.integers(0, 7))
@settings(max_examples=10)
def test_insertion_is_the_best_of_all_places(count: int, arriving: int) -> None:
    """Against every place priced one by one."""
    stay = [t.task_id for t in ALL.tasks if t.task_id != f"t{arriving}"]
    groups = [tuple(stay[i::count]) for i in range(count)]
    surrogate = Surrogate(COST, state_of(ALL), "pad")
    grouping = Grouping(surrogate, 0)
    placing = tuple(Placed(tasks=grouping.sorted(g), bucket=b) for b, g in enumerate(groups))
    found = grouping.insert(placing, [f"t{arriving}"])
    assert found is not None
    choices = [[*groups[:i], (*g, f"t{arriving}"), *groups[i + 1 :]] for i, g in enumerate(groups)]
    best_ns = min(value_ns(surrogate, c) for c in [*choices, [*groups, (f"t{arriving}",)]])
    assert value_ns(surrogate, [p.tasks for p in found]) == grouping.value_ns(found) == best_ns
    assert [p.bucket for p in found[:count]] == list(range(count))
    assert [p.bucket for p in found[count:]] == [NEW] * (len(found) - count)


def test_a_plan_of_several_backbones_is_kept_or_planned_anew() -> None:
    backbones = planned(some(["t0", "t1"]), make_policy("hf-peft", COST))
    same = step(backbones, some(["t1", "t0"]))
    assert same.kept
    assert same.plan.instances == backbones.instances
    assert "nothing arrived or left" in same.reason
    came = step(backbones, some(["t0", "t1", "t2"]))
    assert not came.kept
    assert "cannot be changed task by task" in came.reason
    assert came.plan.made_by.policy == "muxtune"


def test_without_a_plan_in_force_the_policy_plans() -> None:
    found = step(None, ALL)
    assert (found.kept, found.reason, found.moved) == (False, "no plan was in force", ())
    assert time_ns(found.plan) == time_ns(planned(ALL))
    with pytest.raises(InfeasibleError, match="rank 0 needs"):
        replan(POLICY, state_of(ALL, memory_bytes=2**20))


def test_a_task_of_another_type_under_an_old_name_has_left_and_arrived() -> None:
    larger = replace(ALL.task("t2"), global_batch_samples=7)
    changed = replace(ALL, tasks=tuple(larger if t.task_id == "t2" else t for t in ALL.tasks))
    found = step(planned(ALL), changed)
    assert found.arrived == found.left == ("t2",)
    assert found.plan.workload.task("t2").global_batch_samples == 7


def test_what_does_not_fit_any_more_is_planned_anew() -> None:
    """The plan in force was made for more memory than there is now: all in one hTask."""
    one = planned(some(["t0", "t1", "t2", "t3"]), make_policy("sl-peft", COST))
    least = min(m for m in range(10 * 2**20, 200 * 2**20, 2 * 2**20) if _fits(with_memory(parse_cluster("4xA40"), m)))
    cluster = with_memory(parse_cluster("4xA40"), least)
    found = replan(
        POLICY,
        replace(state_of(some(["t0", "t1", "t2", "t3"])), cluster=cluster, current=replace(one, cluster=cluster)),
    )
    assert not found.kept
    assert check(found.plan) == ()
    assert found.reason == "the plan in force cannot hold who is here now: the policy planned anew"


def _fits(cluster: Any) -> bool:
    try:
        POLICY.plan(replace(state_of(some(["t0", "t1", "t2", "t3"])), cluster=cluster))
    except InfeasibleError:
        return False
    return True


def test_cache_is_bounded_and_forgets_the_oldest() -> None:
    cache = PlanCache[int](2)
    for key in ("a", "b"):
        assert cache.get(key) is None
        cache.put(key, 1)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert [cache.get(k) for k in ("a", "b", "c")] == [1, None, 3]
    assert (len(cache), cache.hits, cache.misses) == (2, 3, 3)
    with pytest.raises(ValueError, match="size=0"):
        PlanCache[int](0)


def test_wrong_questions_are_refused() -> None:
    plan = planned(some(["t0", "t1"]))
    with pytest.raises(InputError, match="the plan in force is for model tiny-llama, the workload for gpt2"):
        step(plan, replace(some(["t0"]), model=model_preset("gpt2")))
    with pytest.raises(InputError, match="the plan in force is for cluster 4xA40, not for 2xA40"):
        step(plan, some(["t0"]), state={"cluster": parse_cluster("2xA40")})
    with pytest.raises(InputError, match="objective energy-per-token is judged by the simulator"):
        step(plan, some(["t0"]), state={"goal": Goal(objective="energy-per-token")})
    for wrong in ({"replan_cost_ns": -1}, {"horizon_ns": 0}, {"moves": -1}, {"groups": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ReplanConfig(**wrong)  # type: ignore[arg-type]


TASK = "  - {{task_id: {0}, dataset: {1}, global_batch_samples: 4, peft: {{kind: lora, rank: 8}}}}\n"


def write(path: Path, *tasks: tuple[str, str]) -> str:
    path.write_text("model: tiny-gpt2\ntasks:\n" + "".join(TASK.format(*t) for t in tasks))
    return str(path)


def test_the_command_changes_a_plan_in_force(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = write(tmp_path / "before.yaml", ("a", "sst2"), ("b", "rte"))
    after = write(tmp_path / "after.yaml", ("a", "sst2"), ("c", "openbookqa"))
    common = ["--cluster", "2xA40", "--policy", "muxtune"]
    assert main(["plan", "--workload", before, *common, "--out", "one.json"]) == 0
    capsys.readouterr()
    again = ["plan", "--workload", after, *common, "--current", "one.json", "--out", "two.json"]
    assert main([*again, "--replan-cost", "3600", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["replan"]["kept"]
    assert (body["replan"]["arrived"], body["replan"]["left"]) == (["c"], ["b"])
    assert body["replan"]["judged_by"] == "simulator"
    assert body["replan"]["replan_cost_ns"] == 3600 * 10**9
    assert body["layout"] == "tp=1 pp=2 dp=1"
    assert main(again) == 0
    assert "arrived: c; left: b" in capsys.readouterr().out
    assert main([*again, "--tp", "2"]) == 2
    assert "--tp with --current" in capsys.readouterr().err
    assert main(["plan", "--workload", after, *common, "--full"]) == 2
    assert "name it with --current" in capsys.readouterr().err
    assert main([*again, "--horizon", "0"]) == 2
    assert "--horizon 0.0: give seconds above 0" in capsys.readouterr().err


def test_the_guide_is_right(capsys: Any) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example: replan -->\n```python\n(.*?)```", guide, re.DOTALL)
    assert found is not None
    exec(found.group(1), {"policy": POLICY, "state": state_of(ALL)})
    assert capsys.readouterr().out.endswith("('t0',) 0 2\n")
