"""hf-peft: one backbone per task on the same devices, one task after the other (MuxTune §5.1, baseline HF-PEFT)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan, require_feasible
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan

Residency = Literal["resident", "swapped"]


@noun
class BackbonesConfig:
    """`swapped` keeps one backbone at a time in memory (the swap is not timed); `resident` keeps one a task, as §5.3 does."""

    residency: Residency = "resident"

    def __post_init__(self) -> None:
        if self.residency not in get_args(Residency):
            raise ValueError(f"residency={self.residency!r}: known are {list(get_args(Residency))}")


class HfPeft(Policy):
    """Every task has its own backbone and micro-batches; tasks follow each other by id."""

    Config = BackbonesConfig

    def plan(self, state: SystemState) -> Plan:
        """One instance a task.

        Raises:
            InfeasibleError: the backbones of all tasks do not fit side by side.
        """
        ids = sorted(t.task_id for t in state.workload.tasks)
        instances = [make_instance(state, task_id, [[task_id]], [[0]]) for task_id in ids]
        plan = make_plan(self, "hf-peft", state, instances)
        return require_feasible(replace(plan, residency=self.config.residency))
