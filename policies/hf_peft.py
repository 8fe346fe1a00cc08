"""hf-peft: one backbone per task on the same devices, one task after the other (MuxTune §5.1, baseline HF-PEFT)."""

from __future__ import annotations

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan, require_feasible
from muxtune.spec.plan import Plan


class HfPeft(Policy):
    """Every task has its own resident backbone and micro-batches; the pipeline is flushed before the next task."""

    def plan(self, state: SystemState) -> Plan:
        """One instance a task.

        Raises:
            InfeasibleError: the backbones of all tasks do not fit side by side.
        """
        ids = [t.task_id for t in state.workload.tasks]
        instances = [make_instance(state, task_id, [[task_id]], [[0]]) for task_id in ids]
        return require_feasible(make_plan(self, "hf-peft", state, instances))
