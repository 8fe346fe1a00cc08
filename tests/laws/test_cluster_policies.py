"""Laws that hold for every cluster policy found, with its switches thrown (the laws are in experiments/cluster_laws.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from muxtune.experiments.cluster_laws import CLUSTER_LAWS, outcome, outcomes_elsewhere
from muxtune.experiments.laws import Law
from muxtune.policies.cluster.base import cluster_policies, make_cluster_policy
from muxtune.spec.errors import InputError

KEYS = sorted(cluster_policies())


def variants(key: str) -> Iterator[str]:
    """The policy as it is, then with each switch of type bool thrown."""
    yield key
    for field in dataclasses.fields(cluster_policies()[key].Config):
        if isinstance(field.default, bool):
            yield f"{key}:{field.name}={str(not field.default).lower()}"


REFERENCES = [reference for key in KEYS for reference in variants(key)]


def test_every_policy_of_the_design_is_there() -> None:
    assert {"fcfs", "srtf", "max-min-fairness", "slo-aware", "multiplexing-aware"} <= set(KEYS)
    assert {"las", "priority", "budget", "energy-aware"} <= set(KEYS)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("law", CLUSTER_LAWS, ids=lambda law: law.name)
def test_law(law: Law, reference: str) -> None:
    assert law.counterexample(reference) is None


def test_replays_are_equal_in_other_processes() -> None:
    seen = outcomes_elsewhere(KEYS, 1)
    assert seen == outcomes_elsewhere(KEYS, 2)
    assert seen == {key: outcome(key) for key in KEYS}


BAD = """
import itertools
from muxtune.experiments.laws import Law
from muxtune.policies.cluster.base import ClusterPolicy, rooms, spread

class Lazy(ClusterPolicy):
    def place(self, job, fleet):
        return None if job.index == 3 else spread(job, fleet)

class Crowded(ClusterPolicy):
    def place(self, job, fleet):
        return next(iter(fleet.instances(job.model)), None) or spread(job, fleet)

class Counting(ClusterPolicy):
    calls = itertools.count()
    def admit(self, job, fleet):
        return "no" if next(self.calls) % 7 == 0 else None

class Crashing(ClusterPolicy):
    def key(self, job, fleet):
        return {}["nothing"]
"""


@pytest.mark.parametrize(
    ("name", "law", "told"),
    [
        ("Lazy", "ends", "never left"),
        ("Crowded", "capped", "which has no room for it: ask fleet.has_room"),
        ("Counting", "pure", "two replays differ"),
        ("Crashing", "works", "raised KeyError at mine.py"),
    ],
)
def test_a_policy_that_breaks_a_law_is_told(tmp_path: Path, name: str, law: str, told: str) -> None:
    (tmp_path / "mine.py").write_text(BAD)
    found = next(x for x in CLUSTER_LAWS if x.name == law).counterexample(f"{tmp_path / 'mine.py'}:{name}")
    assert found is not None
    assert told in found


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "unknown cluster policy 'nothing': known are budget, energy-aware, fcfs"),
        ("srtf:slack=0.5", "cluster policy srtf: slack=0.5: must be at least 1"),
        ("las:rounds=1", "unknown option of cluster policy las 'rounds'"),
        ("./absent.py:Mine", "absent.py: file not found"),
    ],
)
def test_wrong_references(reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_cluster_policy(reference)
