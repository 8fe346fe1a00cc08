"""temporal: no batching; micro-batches of the tasks enter the pipeline in turn (mLoRA's pipeline)."""

from __future__ import annotations

from dataclasses import replace

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan, require_feasible
from muxtune.spec.order import round_robin
from muxtune.spec.plan import Plan


class Temporal(Policy):
    """One hTask and one bucket a task on a shared backbone; units are fed round-robin, in order 1F1B."""

    def plan(self, state: SystemState) -> Plan:
        """One instance with interleaved micro-batches.

        Raises:
            InfeasibleError: the micro-batches in flight do not fit.
        """
        ids = sorted(t.task_id for t in state.workload.tasks)
        instance = make_instance(state, "shared", [[i] for i in ids], [[h] for h in range(len(ids))])
        instance = replace(instance, feed=round_robin(instance.buckets))
        return require_feasible(make_plan(self, "temporal", state, [instance]))
