"""Laws that hold for every policy found, with every value of its switches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from muxtune.policies.base import Policy, SystemState, make_policy, policies
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.check import check
from muxtune.spec.errors import InfeasibleError
from muxtune.spec.files import read_noun, write_noun
from muxtune.spec.noun import digest
from muxtune.spec.plan import Plan
from muxtune.spec.task import Workload

#: (tasks, tp, pp, C): one task to eight, fewer samples than micro-batches, one stage and two.
SHAPES = ((1, 1, 1, 1), (1, 1, 2, 4), (3, 1, 2, 2), (3, 2, 1, 2), (5, 1, 1, 4), (8, 1, 2, 4), (8, 2, 2, 1))

PLAN_ELSEWHERE = """
import json, sys
from pathlib import Path
from muxtune.policies.base import SystemState, make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.files import read_noun
from muxtune.spec.layout import even_layout
from muxtune.spec.noun import digest
from muxtune.spec.task import Workload
workload = read_noun(Workload, Path(sys.argv[1]))
state = SystemState(
    workload=workload, cluster=parse_cluster("4xcpu"), layout=even_layout(workload.model, pp=2), microbatches=2, seed=5
)
print(json.dumps({name: digest(make_policy(name, Roofline()).plan(state)) for name in sys.argv[2:]}))
"""


def variants(key: str, found: type[Policy]) -> Iterator[str]:
    """The policy as it is, then with each switch thrown (bool and Literal options)."""
    yield key
    hints = get_type_hints(found.Config)
    for field in dataclasses.fields(found.Config):
        kind = hints[field.name]
        values: tuple[Any, ...] = (
            (False, True) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
        )
        for value in values:
            if value != field.default:
                yield f"{key}:{field.name}={str(value).lower()}"


REFERENCES = [reference for key, found in sorted(policies().items()) for reference in variants(key, found)]
#: Policies that cannot work without the simulator are planned in this process only, where the state has one.
KEYS = sorted(policies())


def key_of(reference: str) -> str:
    return reference.partition(":")[0]


@pytest.fixture(params=SHAPES, ids=lambda s: "tasks{}-tp{}-pp{}-C{}".format(*s))
def state(request: pytest.FixtureRequest, tiny_workload: Any, tiny_state: Any) -> SystemState:
    tasks, tp, pp, microbatches = request.param
    found: SystemState = tiny_state(tiny_workload(tasks), tp=tp, pp=pp, microbatches=microbatches)
    return found


@pytest.mark.parametrize("reference", REFERENCES)
def test_plan_is_valid_pure_and_signed(reference: str, state: SystemState) -> None:
    plan = make_policy(reference, Roofline()).plan(state)
    assert check(plan) == ()
    placed = Counter(t for i in plan.instances for t in i.tasks)
    assert placed == Counter(t.task_id for t in state.workload.tasks)
    assert plan.workload == state.workload
    assert plan.cluster == state.cluster
    assert plan.made_by.policy == key_of(reference)
    assert plan.made_by.cost_model == Roofline().model_id
    assert digest(make_policy(reference, Roofline()).plan(state)) == digest(plan)


@pytest.mark.parametrize("reference", REFERENCES)
def test_plan_survives_its_file(reference: str, tiny_state: Any, tmp_path: Path) -> None:
    plan = make_policy(reference, Roofline()).plan(tiny_state(pp=2))
    write_noun(plan, tmp_path / "plan.json")
    again = read_noun(Plan, tmp_path / "plan.json")
    assert again == plan
    assert digest(again) == digest(plan)


@pytest.mark.parametrize("reference", REFERENCES)
def test_config_in_made_by_plans_the_same_again(reference: str, tiny_state: Any) -> None:
    plan = make_policy(reference, Roofline()).plan(tiny_state(pp=2))
    spelled = ":".join(filter(None, (plan.made_by.policy, plan.made_by.config)))
    assert make_policy(spelled, Roofline()).plan(tiny_state(pp=2)) == plan


@pytest.mark.parametrize("reference", REFERENCES)
def test_no_memory_is_a_clear_no(reference: str, tiny_state: Any) -> None:
    with pytest.raises(InfeasibleError, match=r"rank \d+ .*needs .* has 1\.00 MiB"):
        make_policy(reference, Roofline()).plan(tiny_state(pp=2, memory_bytes=2**20))


def test_plan_is_equal_in_other_processes(tiny_workload: Any, tmp_path: Path) -> None:
    workload: Workload = tiny_workload(6)
    write_noun(workload, tmp_path / "workload.json")
    command = [sys.executable, "-c", PLAN_ELSEWHERE, str(tmp_path / "workload.json"), *KEYS]
    seen = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
        seen.append(json.loads(run.stdout))
    assert seen[0] == seen[1]
    assert set(seen[0]) == set(KEYS)
