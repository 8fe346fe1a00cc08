"""greedy: merge the pair of hTasks that lowers the surrogate W + Σ 2C·max_s L^s most, until none does (baseline)."""

from __future__ import annotations

from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_instance, make_plan, require_alignment, require_feasible
from muxtune.policies.fusion import greedy_partition
from muxtune.policies.surrogate import Surrogate, value_ns
from muxtune.spec.align import Alignment
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan, SolverRecord


@noun
class GreedyConfig:
    """How the tasks of an hTask are aligned; `chunk` is the chunk size of alignment `chunk` (0: the paper's rule)."""

    alignment: Alignment = "pad"
    chunk: int = 0

    def __post_init__(self) -> None:
        require_alignment(self.alignment, self.chunk)


class Greedy(Policy):
    """Agglomerative fusion, not restricted to neighbours in any order; one bucket an hTask, largest first, 1F1B."""

    Config = GreedyConfig

    def plan(self, state: SystemState) -> Plan:
        """One shared instance.

        Raises:
            InfeasibleError: a task alone, or the units in flight under 1F1B, do not fit.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        surrogate = Surrogate(self.cost, state, self.config.alignment, self.config.chunk)
        surrogate.require_single_tasks()
        groups = greedy_partition(surrogate, surrogate.sorted_tasks())
        descending = sorted(range(len(groups)), key=lambda h: (-surrogate.first_stage_ns(groups[h]), h))
        solver = SolverRecord(
            name="greedy-merge",
            status="no merge of two hTasks improves",
            value_ns=value_ns(surrogate, groups),
            evaluations=surrogate.priced,
        )
        instance = make_instance(
            state, "shared", groups, [[h] for h in descending], self.config.alignment, self.config.chunk
        )
        return require_feasible(make_plan(self, "greedy", state, [instance], solver))
