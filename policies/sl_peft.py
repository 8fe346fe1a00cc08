"""sl-peft: all tasks in one batch, zero-padded to the global maximum (S-LoRA applied to training; MuxTune §5.1)."""

from __future__ import annotations

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan, require_feasible
from muxtune.spec.plan import Plan


class SlPeft(Policy):
    """One hTask with every task, one bucket, every row as long as the longest billed length."""

    def plan(self, state: SystemState) -> Plan:
        """One instance, one hTask.

        Raises:
            InfeasibleError: the batch of all tasks does not fit.
        """
        everyone = sorted(t.task_id for t in state.workload.tasks)
        instance = make_instance(state, "shared", [everyone], [[0]])
        return require_feasible(make_plan(self, "sl-peft", state, [instance]))
