"""Policy: plan(state) → Plan, pure. One file a policy; the file name is its key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muxtune.policies.objectives.base import THROUGHPUT, Goal
from muxtune.sim.cost.base import CostModel
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InputError
from muxtune.spec.estimate import Estimate
from muxtune.spec.layout import Layout, LayoutChoice
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan
from muxtune.spec.registry import parse_config, plugin_class, plugins, split_reference
from muxtune.spec.task import Workload

Evaluate = Callable[[Plan], Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemState:
    """What a policy plans for. `evaluate` runs the simulator on a candidate, for policies that search with it.

    `choices` are the layouts and micro-batch counts that a policy with `chooses_layout` may pick from; without any it takes
    `layout` and `microbatches`, or what its docstring says. `goal` is what a policy that judges plans ranks them by (`rank`).
    `current` is the plan in force, where there is one: tasks that it has and `workload` has not have left, others have arrived
    (policies/online/replan.py; a policy itself need not look at it).
    """

    workload: Workload
    cluster: Cluster
    layout: Layout
    microbatches: int
    seed: int = 0
    evaluate: Evaluate | None = field(default=None, compare=False)
    choices: tuple[LayoutChoice, ...] = ()
    goal: Goal = THROUGHPUT
    current: Plan | None = None

    def rank(self, found: Estimate) -> tuple[float, float, int]:
        """Sorts what is predicted of plans by the goal, best first; by iteration time where nothing else was asked."""
        return self.goal.rank(self.workload, found)


@noun
class NoConfig:
    """A policy without options."""


class Policy:
    """Base of every policy. A subclass sets `Config` (its own frozen options) and defines `plan`.

    `chooses_layout`: it picks among `state.choices` itself; every other policy is planned once for each of them
    (policies/choices.py). `quick` are options under which the laws run, for a policy with a budget.
    """

    Config: type[Any] = NoConfig
    chooses_layout: bool = False
    quick: str = ""

    def __init__(self, config: Any, cost: CostModel) -> None:
        self.config = config
        self.cost = cost

    def plan(self, state: SystemState) -> Plan:
        """Decide. Must not read clocks or globals: equal arguments give equal Plans.

        Raises:
            InfeasibleError: nothing fits, with the tightest constraint named.
        """
        raise NotImplementedError


def require_evaluate(key: str, state: SystemState) -> Evaluate:
    """The simulator that a searching policy was handed.

    Raises:
        InputError: there is none.
    """
    if state.evaluate is None:
        raise InputError(f"policy {key} judges plans with the simulator: give SystemState an `evaluate`")
    return state.evaluate


def policies() -> dict[str, type[Policy]]:
    """Every policy by key: files of this folder, then entry points in `muxtune.policies`."""
    return plugins("policies", Path(__file__).parent, "muxtune.policies", Policy)


def make_policy(reference: str, cost: CostModel) -> Policy:
    """Build a policy from `NAME`, `NAME:key=value,…` or `FILE.py:CLASS`.

    Raises:
        UnknownKeyError: no such policy or option.
    """
    name, options = split_reference(reference)
    found: type[Policy] = plugin_class("policy", name, Policy, policies)
    return found(parse_config("policy", name, found.Config, options), cost)
