"""hf-peft: one backbone per task on the same devices, in turn or all at once (MuxTune §5.1, baseline HF-PEFT)."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan, require_feasible
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan, Residency, Sharing


@noun
class BackbonesConfig:
    """`swapped` keeps one backbone at a time in memory (the swap is not timed); `resident` keeps one a task, as §5.3 does.

    `sharing`: tasks on the same devices follow each other (`sequence`) or run at once (`corun`), as under MPS (§2.3).
    """

    residency: Residency = "resident"
    sharing: Sharing = "sequence"

    def __post_init__(self) -> None:
        for name, known in (("residency", Residency), ("sharing", Sharing)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}={getattr(self, name)!r}: known are {list(get_args(known))}")
        if (self.residency, self.sharing) == ("swapped", "corun"):
            raise ValueError(
                "residency='swapped' with sharing='corun': what runs at once stays in memory; use `resident`"
            )


class HfPeft(Policy):
    """Every task has its own backbone and micro-batches; tasks follow each other by id, or run at once."""

    Config = BackbonesConfig

    def plan(self, state: SystemState) -> Plan:
        """One instance a task.

        Raises:
            InfeasibleError: the backbones of all tasks do not fit side by side.
        """
        ids = sorted(t.task_id for t in state.workload.tasks)
        instances = [make_instance(state, task_id, [[task_id]], [[0]]) for task_id in ids]
        plan = make_plan(self, "hf-peft", state, instances)
        return require_feasible(replace(plan, residency=self.config.residency, sharing=self.config.sharing))
