"""A co-scheduling policy as the cluster engine asks it: task types on an instance → what the simulator predicts of its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from muxtune.policies.base import Evaluate, Policy, SystemState, make_policy, policies
from muxtune.sim.cost._frequency import AtFrequency
from muxtune.sim.cost.base import CostModel
from muxtune.sim.recurrence import recur_blocks
from muxtune.sim.simulate import estimate, make_evaluate
from muxtune.sim.stage import StageCache
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InfeasibleError
from muxtune.spec.estimate import Estimate
from muxtune.spec.fleet import InstanceShape, TaskType
from muxtune.spec.frequency import frequency_step
from muxtune.spec.lengths import LengthDistribution
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.noun import canonical_bytes
from muxtune.spec.registry import split_reference
from muxtune.spec.task import Task, Workload

#: Policies that give every task a backbone of its own: an instance of theirs runs one task (MuxTune Fig. 1).
SEPARATE = ("hf-peft", "nemo")


def tasks_per_instance(policy: str, most: int) -> int:
    """How many tasks share an instance under a co-scheduling policy: one where each has its own backbone."""
    return 1 if split_reference(policy)[0] in SEPARATE else most


class PlanPricer:
    """Plans and simulates. Equal multisets give equal estimates: tasks are listed by the bytes of their types."""

    def __init__(
        self,
        policy: str,
        cost_of: Callable[[Cluster], CostModel],
        lengths: Callable[[str], LengthDistribution],
        *,
        model_of: Callable[[str], ModelSpec] = model_preset,
        seed: int = 0,
        draws: int = 2,
    ) -> None:
        self.policy, self.cost_of, self.lengths, self.model_of = policy, cost_of, lengths, model_of
        self.seed, self.draws = seed, draws
        self._tools: dict[tuple[str, int], tuple[Policy, Evaluate, Evaluate]] = {}

    def __call__(self, types: Sequence[TaskType], shape: InstanceShape) -> Estimate:
        """One iteration of these tasks: the plan of the policy on the shape.

        Raises:
            InfeasibleError: they do not fit together.
        """
        policy, evaluate, predict = self._for(shape)
        state = SystemState(
            workload=self.workload(types),
            cluster=shape.slice,
            layout=shape.layout,
            microbatches=shape.microbatches,
            seed=self.seed,
            evaluate=evaluate,
        )
        return predict(policy.plan(state))

    def workload(self, types: Sequence[TaskType]) -> Workload:
        """The tasks as a workload of their backbone.

        Raises:
            InfeasibleError: a type asks for more positions than the backbone has.
        """
        ordered = sorted(types, key=canonical_bytes)
        names = dict.fromkeys(t.dataset for t in ordered)
        tasks = tuple(
            Task(
                task_id=f"task-{place:03d}",
                peft=t.peft,
                dataset=t.dataset,
                billed_len_tokens=t.billed_len_tokens,
                global_batch_samples=t.global_batch_samples,
            )
            for place, t in enumerate(ordered)
        )
        tables = tuple(self.lengths(name) for name in names)
        try:
            return Workload(name="instance", model=self.model_of(ordered[0].model), datasets=tables, tasks=tasks)
        except ValueError as error:
            raise InfeasibleError(str(error)) from error

    def _for(self, shape: InstanceShape) -> tuple[Policy, Evaluate, Evaluate]:
        """The policy and the simulator of a device and clock; stage runs are shared by all plans there."""
        key = (shape.slice.device.name, shape.frequency_mhz)
        if key not in self._tools:
            cost = self.cost_of(shape.slice)
            if shape.frequency_mhz:
                cost = AtFrequency(cost, frequency_step(shape.slice.device, shape.frequency_mhz))
            evaluate = make_evaluate(cost, self.seed, self.draws)
            self._tools[key] = make_policy(self.policy, cost), evaluate, self._predict(cost, evaluate)
        return self._tools[key]

    def _predict(self, cost: CostModel, evaluate: Evaluate) -> Evaluate:
        """What predicts a plan of this policy: one from outside is checked again, the house's have been (a law says so)."""
        if split_reference(self.policy)[0] not in policies():
            return evaluate
        cache = StageCache(cost, recur_blocks)
        return lambda plan: estimate(plan, cost, self.seed, self.draws, cache=cache)
