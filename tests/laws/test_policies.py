"""Laws that hold for every policy found, with every value of its switches (the laws are in experiments/laws.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from muxtune.experiments.laws import LAWS, Law, ask_all, planned_elsewhere, variants, with_options
from muxtune.policies.base import policies
from muxtune.spec.errors import InputError

KEYS = sorted(policies())
REFERENCES = [reference for key in KEYS for reference in variants(key)]
#: Starting two processes for each reference would take minutes: one pair plans for all keys, below.
HERE = [law for law in LAWS if law.name != "everywhere"]


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("law", HERE, ids=lambda law: law.name)
def test_law(law: Law, reference: str) -> None:
    assert law.counterexample(reference) is None


def test_plan_is_equal_in_other_processes() -> None:
    asked = [next(iter(variants(key))) for key in KEYS]
    seen = [planned_elsewhere(asked, hash_seed) for hash_seed in (1, 2)]
    assert seen[0] == seen[1]
    assert set(seen[0]) == set(asked)


BAD = """
import itertools
import random
from dataclasses import replace
from muxtune.policies.base import Policy
from muxtune.policies.build import make_instance, make_plan, require_feasible

def one_batch(policy, state, key="bad"):
    ids = [t.task_id for t in state.workload.tasks]
    return make_plan(policy, key, state, [make_instance(state, "shared", [ids], [[0]])])

class Unsafe(Policy):
    def plan(self, state):
        return one_batch(self, state)

class Forgetful(Policy):
    def plan(self, state):
        few = replace(state, workload=replace(state.workload, tasks=state.workload.tasks[:1]))
        return require_feasible(one_batch(self, few))

class Counting(Policy):
    calls = itertools.count()
    def plan(self, state):
        return require_feasible(one_batch(self, state, f"bad{next(self.calls)}"))

class Hashing(Policy):
    def plan(self, state):
        ids = list({t.task_id for t in state.workload.tasks})
        groups = [[i] for i in ids]
        instance = make_instance(state, "shared", groups, [[h] for h in range(len(ids))])
        return require_feasible(make_plan(self, "bad", state, [instance]))

class Unsigned(Policy):
    def plan(self, state):
        plan = require_feasible(one_batch(self, state))
        return replace(plan, made_by=replace(plan.made_by, cost_model="mine"))

class Crashing(Policy):
    def plan(self, state):
        return {}["nothing"]

class Empty(Policy):
    def plan(self, state):
        return None
"""


@pytest.mark.parametrize(
    ("name", "law", "told"),
    [
        ("Unsafe", "refuses", "require_feasible"),
        ("Forgetful", "whole", "3 tasks, tp=1 pp=2 C=2: task t1 is placed 0 times"),
        ("Counting", "pure", "planned otherwise the second time"),
        ("Hashing", "everywhere", "hash seeds"),
        ("Unsigned", "signed", "cost_model is 'mine', expected 'roofline"),
        ("Crashing", "executable", "raised KeyError at mine.py"),
        ("Empty", "executable", "returned NoneType, not a Plan"),
    ],
)
def test_a_policy_that_breaks_a_law_is_told(tmp_path: Path, name: str, law: str, told: str) -> None:
    (tmp_path / "mine.py").write_text(BAD)
    found = {row["law"]: row for row in ask_all(f"{tmp_path / 'mine.py'}:{name}")}
    assert not found[law]["ok"]
    assert told in found[law]["counterexample"]
    assert "\n" not in found[law]["counterexample"]


def test_options_are_added_and_own_ones_win() -> None:
    assert with_options("a", "") == "a"
    assert with_options("a", "k=1") == "a:k=1"
    assert with_options("./x.py:A:k=2", "k=1,j=3") == "./x.py:A:k=2,j=3"
    assert next(iter(variants("search:evaluations=30"))) == "search:evaluations=30"


def test_a_wrong_reference_is_no_counterexample() -> None:
    with pytest.raises(InputError, match="unknown policy 'nothing'"):
        ask_all("nothing")
