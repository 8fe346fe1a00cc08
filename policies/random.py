"""random: a seeded random partition into hTasks in random bucket order (baseline for what planning is worth)."""

from __future__ import annotations

import numpy as np

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan, require_feasible
from muxtune.policies.surrogate import Surrogate, value_ns
from muxtune.spec.plan import Plan, SolverRecord


class Random(Policy):
    """Each task joins a random hTask that still fits, or opens one; one bucket an hTask, 1F1B."""

    def plan(self, state: SystemState) -> Plan:
        """One shared instance; `state.seed` decides everything.

        Raises:
            InfeasibleError: a task alone, or the units in flight under 1F1B, do not fit.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        surrogate = Surrogate(self.cost, state, "pad")
        surrogate.require_single_tasks()
        rng = np.random.default_rng(state.seed)
        ids = sorted(t.task_id for t in state.workload.tasks)
        groups: list[tuple[str, ...]] = []
        for place in rng.permutation(len(ids)):
            task_id = ids[place]
            open_groups = [g for g, group in enumerate(groups) if surrogate.admits((*group, task_id))]
            chosen = int(rng.integers(len(open_groups) + 1))
            if chosen == len(open_groups):
                groups.append((task_id,))
            else:
                groups[open_groups[chosen]] += (task_id,)
        buckets = [[int(h)] for h in rng.permutation(len(groups))]
        solver = SolverRecord(
            name="random",
            status=f"drawn with seed {state.seed}",
            value_ns=value_ns(surrogate, groups),
            evaluations=surrogate.priced,
        )
        instance = make_instance(state, "shared", groups, buckets)
        return require_feasible(make_plan(self, "random", state, [instance], solver))
