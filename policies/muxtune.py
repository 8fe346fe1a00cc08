"""muxtune: the paper's planner. DP fusion (Eq. 6), bucket balance (Eq. 7), eager template (§3.4.1), Algorithm 1."""

from __future__ import annotations

from typing import Literal, get_args

from muxtune.policies.arrange import arrange
from muxtune.policies.base import Policy, SystemState
from muxtune.policies.build import make_plan, require_alignment, require_feasible
from muxtune.policies.fusion import exact_partition, paper_partition
from muxtune.policies.surrogate import Partition, Surrogate, value_ns
from muxtune.spec.align import Alignment
from muxtune.spec.clock import LaunchRule, Priority, Ties
from muxtune.spec.noun import noun
from muxtune.spec.plan import AdapterFusion, Plan, SolverRecord

Charge = Literal["paper", "exact"]


@noun
class MuxTuneConfig:
    """Switches of the ablations.

    `charge`: what an extra hTask costs in the DP; `paper` is L/S (Eq. 6), `exact` is 2C·max_s L^s beside the largest
    warm-up. `fusion` off: one hTask a task. `orchestration` off: one bucket an hTask, in the DP's order, plain 1F1B.
    `priority` and `ties` order the launches inside a clock (spec/clock.py): Algorithm 1, or the critical path.
    `chunk` is the chunk size of alignment `chunk`; 0 is the paper's rule. `adapter_fusion`: `bucket` also launches the
    adapters of a bucket's hTasks as one where each holds a single task (§3.4.3); `htask` only those inside an hTask.
    """

    fusion: bool = True
    charge: Charge = "paper"
    alignment: Alignment = "pad"
    chunk: int = 0
    orchestration: bool = True
    priority: Priority = "shallow"
    ties: Ties = "longest"
    adapter_fusion: AdapterFusion = "htask"

    def __post_init__(self) -> None:
        if self.charge not in get_args(Charge):
            raise ValueError(f"charge={self.charge!r}: known are {list(get_args(Charge))}")
        require_alignment(self.alignment, self.chunk)
        if self.priority not in get_args(Priority):
            raise ValueError(f"priority={self.priority!r}: known are {list(get_args(Priority))}")
        if self.ties not in get_args(Ties):
            raise ValueError(f"ties={self.ties!r}: known are {list(get_args(Ties))}")
        if self.adapter_fusion not in get_args(AdapterFusion):
            raise ValueError(f"adapter_fusion={self.adapter_fusion!r}: known are {list(get_args(AdapterFusion))}")


class MuxTune(Policy):
    """Fuses neighbours in the order of tokens per micro-batch, balances them into buckets, launches eagerly."""

    Config = MuxTuneConfig

    def plan(self, state: SystemState) -> Plan:
        """One shared instance.

        The DP rejects hTasks that do not fit alone under 1F1B; the eager order keeps to what the device has left.

        Raises:
            InfeasibleError: a task alone does not fit, or (orchestration off) the units in flight do not.
            ExtrapolationError: the cost model does not answer for a task alone.
        """
        rule = LaunchRule(priority=self.config.priority, ties=self.config.ties)
        surrogate = Surrogate(
            self.cost, state, self.config.alignment, self.config.chunk, rule, self.config.adapter_fusion
        )
        surrogate.require_single_tasks()
        groups = self._fuse(surrogate)
        fused = ("contiguous-dp", f"exact for its recurrence (charge {self.config.charge})")
        name, status = fused if self.config.fusion else ("no-fusion", "nothing to solve")
        value = value_ns(surrogate, groups)
        instance, gap = arrange(surrogate, groups, orchestration=self.config.orchestration)
        solver = SolverRecord(name=name, status=status, value_ns=value, evaluations=surrogate.priced, balance_gap=gap)
        return require_feasible(make_plan(self, "muxtune", state, [instance], solver))

    def _fuse(self, surrogate: Surrogate) -> Partition:
        order = surrogate.sorted_tasks()
        if not self.config.fusion:
            return tuple((t,) for t in order)
        return exact_partition(surrogate, order) if self.config.charge == "exact" else paper_partition(surrogate, order)
