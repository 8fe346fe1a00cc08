"""A co-scheduling policy as the cluster engine asks it: task types on an instance → what the simulator predicts of its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from muxtune.policies.base import Evaluate, Policy, SystemState, make_policy, policies
from muxtune.policies.muxtune import MuxTuneConfig
from muxtune.policies.online.incremental import Incremental
from muxtune.sim.cluster.prices import Price
from muxtune.sim.cost._frequency import AtFrequency
from muxtune.sim.cost.base import CostModel
from muxtune.sim.recurrence import recur_blocks
from muxtune.sim.simulate import estimate, make_evaluate
from muxtune.sim.stage import StageCache
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InfeasibleError, InputError
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
        policy, evaluate, predict = self.tools(shape)
        return predict(policy.plan(self.state(types, shape, evaluate)))

    def state(self, types: Sequence[TaskType], shape: InstanceShape, evaluate: Evaluate | None = None) -> SystemState:
        """The tasks on the shape, as a policy is asked.

        Raises:
            InfeasibleError: as `workload`.
        """
        return SystemState(
            workload=self.workload(types),
            cluster=shape.slice,
            layout=shape.layout,
            microbatches=shape.microbatches,
            seed=self.seed,
            evaluate=evaluate,
        )

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

    def tools(self, shape: InstanceShape) -> tuple[Policy, Evaluate, Evaluate]:
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


class IncrementalPricer:
    """Prices from kept prices of hTasks (policies/online/incremental.py), partitioned as the co-scheduling policy does.


    At most `most` tasks share an instance. Energy is not known; the cost model's own error is not carried along.

    Raises:
        InputError: the policy has no such partition.
    """

    def __init__(self, pricer: PlanPricer, most: int) -> None:
        self.pricer, self.most = pricer, most
        self._kinds: dict[InstanceShape, list[TaskType]] = {}
        self._made: dict[InstanceShape, Incremental] = {}

    def __call__(self, types: Sequence[TaskType], shape: InstanceShape) -> Price:
        """One iteration of these tasks.

        Raises:
            InfeasibleError: they do not fit together.
        """
        counts = Counter(types)
        kinds = self._kinds.setdefault(shape, [])
        if new := [t for t in counts if t not in kinds]:
            kinds += new
            # A new type changes the sums that all others share; types come up once, mixes all the time.
            self._made[shape] = self._incremental(kinds, shape)
        found = self._made[shape].price(tuple(counts[t] for t in kinds))
        return Price(
            iteration_ns=found.iteration_ns,
            billed_tokens=sum(t.step_tokens for t in types),
            joules=None,
            busy=found.busy,
            peak_bytes=found.peak_bytes,
            relative_error=0.0,
        )

    def _incremental(self, kinds: Sequence[TaskType], shape: InstanceShape) -> Incremental:
        policy, _, _ = self.pricer.tools(shape)
        config = policy.config
        if not isinstance(config, MuxTuneConfig) or not (config.fusion and config.orchestration):
            raise InputError(
                f"--incremental with policy {self.pricer.policy}: only the partition of muxtune can be priced from kept "
                "hTasks: take muxtune with fusion and orchestration, or leave --incremental out"
            )
        state = self.pricer.state([t for t in kinds for _ in range(self.most)], shape)
        names = [task.task_id for task in state.workload.tasks]
        # The workload lists types by their bytes.
        at = {t: n * self.most for n, t in enumerate(sorted(kinds, key=canonical_bytes))}
        ids = [names[at[t] : at[t] + self.most] for t in kinds]
        return Incremental(policy.cost, state, ids, config.charge, config.alignment, config.chunk)
