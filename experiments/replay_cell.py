"""Cell: one replay as data (trace, cluster, policies, seed), so that it can be sent to a process, named, run and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.costs import AUTO, CostChoice, choose_cost
from muxtune.experiments.commands.inputs import load_cost
from muxtune.experiments.commands.problem import Options, choose_layout
from muxtune.experiments.commands.trace import Given, open_given
from muxtune.experiments.pricing import IncrementalPricer, PlanPricer, tasks_per_instance
from muxtune.policies.base import SystemState, make_policy
from muxtune.policies.choices import layout_choices, plan_over
from muxtune.policies.cluster.base import make_cluster_policy
from muxtune.sim.cluster.pool import Pool
from muxtune.sim.cluster.random_faults import FaultRates, random_faults
from muxtune.sim.cluster.setup import Setup
from muxtune.sim.simulate import make_evaluate
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.faults import read_faults
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InputError
from muxtune.spec.fleet import Fault, FleetCosts, InstanceShape, TaskType, task_type
from muxtune.spec.jobs import Job, Trace
from muxtune.spec.layout import LayoutChoice
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.noun import digest, noun
from muxtune.spec.units import NS_PER_S

#: Jobs at the start of a trace of which some, evenly spaced by tokens, stand for all when a layout is searched.
SAMPLE_JOBS = 64
#: Share of a device's memory that a backbone may take where the size of an instance is not given.
BACKBONE_SHARE = 0.5


@noun
class Cell:
    """One replay. `clusters` are pools; `costs` and `fault_rates` hold (field, value); `faults` names a failure trace.

    Without `gpus_per_instance` an instance has the smallest power of two of devices on which the backbone takes at most half
    of the memory. `pp` None: as many stages as devices are left. With `search_layout` each co-scheduling policy gets the
    layout and micro-batch count that are best for a sample of the trace; the reference instance stays as given.
    With `merge_types` types of equal billed tokens a step are planned as one (quantisation). With `incremental` mixes are
    priced from kept prices of hTasks, and one mix in a hundred exactly too.
    """

    given: Given
    clusters: tuple[str, ...]
    policy: str = "muxtune"
    cluster_policy: str = "fcfs"
    seed: int = 0
    model: str | None = None
    gpus_per_instance: int | None = None
    tp: int = 1
    pp: int | None = None
    dp: int = 1
    microbatches: tuple[int, ...] = (4,)
    search_layout: bool = False
    tasks_per_instance: int = 8
    max_instances: int | None = None
    until_days: float | None = None
    costs: tuple[tuple[str, float], ...] = ()
    fault_rates: tuple[tuple[str, float], ...] = ()
    faults: str | None = None
    max_restarts: int | None = None
    merge_types: bool = False
    incremental: bool = False
    cost: str = "roofline"
    allow_extrapolation: bool = False
    gpu_hour_price: float = 1.0

    @property
    def key(self) -> str:
        """Names the cell's result."""
        return digest(self)


class Bench:
    """A cell's parts, made once: trace, pools, prices, setup.

    Raises:
        InputError: wrong file, name or option.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.trace = _opened(cell)
        self.clusters = tuple(read_cluster(name) for name in cell.clusters)
        self.rules = make_cluster_policy(cell.cluster_policy)
        self.cap = tasks_per_instance(cell.policy, cell.tasks_per_instance)
        self._chosen: dict[str, LayoutChoice] = {}
        self.pricer = PlanPricer(cell.policy, self.cost_of, self.trace.lengths)
        self._choices = {c.device.name: self._cost_choice(c) for c in self.clusters}
        make_policy(cell.policy, self.cost_of(self.clusters[0]))
        self.quick = IncrementalPricer(self.pricer, self.cap) if cell.incremental else None
        if cell.incremental and cell.merge_types:
            raise InputError("--incremental and --merge-types: two ways to price without planning; leave one out")
        self.solo = PlanPricer("hf-peft", self.cost_of, self.trace.lengths)

    @property
    def priced_with(self) -> tuple[Any, ...]:
        """All that predictions depend on beside policy, types and shapes."""
        cell = self.cell
        return (
            cell.cost,
            cell.allow_extrapolation,
            cell.given.source,
            cell.given.format_key,
            *sorted(self._choices),
            *self.cost_reasons,
        )

    def cost_of(self, cluster: Cluster) -> Any:
        """The cost model of a cluster's device."""
        return self._choices[cluster.device.name].model

    @property
    def cost_reasons(self) -> list[str]:
        """Why each device has the cost model that it has, where `auto` chose it."""
        return [f"cost model of {device}: {c.why}" for device, c in self._choices.items() if c.why]

    def _cost_choice(self, cluster: Cluster) -> CostChoice:
        """What `cost` names; `auto` looks for a profile that covers a sample of the trace's first jobs."""
        cell = self.cell
        first = next(iter(self.trace), None) if cell.cost == AUTO else None
        if first is None:
            named = "roofline" if cell.cost == AUTO else cell.cost
            return CostChoice(model=load_cost(named, cluster, cell.allow_extrapolation))
        model = model_preset(first.model)
        workload, layout = self.pricer.workload(self._sample(model)), self.reference(model).layout
        return choose_cost(AUTO, cluster, workload, [layout], cell.allow_extrapolation)

    def require(self) -> None:
        """Look at the first job, and whether an instance for it fits.

        Raises:
            InputError: the trace has no job, or cannot be read; the instance does not fit.
        """
        first = next(iter(self.trace), None)
        if first is None:
            raise InputError(f"trace {self.cell.given.source}: has no job")
        self.reference(model_preset(first.model))
        self.setup()

    def slice(self, model: ModelSpec) -> Cluster:
        """The first devices of pool 0 that make an instance.

        Raises:
            InputError: the pool has fewer.
        """
        first = self.clusters[0]
        size = self.cell.gpus_per_instance or default_gpus(model, first)
        split = Pool(first).split(size, self.cell.tp)
        if split is None:
            raise InputError(
                f"--gpus-per-instance {size}: cluster {first.name} has {first.size} devices: give fewer, or a larger --cluster"
            )
        return Pool(first).slice(split)

    def reference(self, model: ModelSpec) -> LayoutChoice:
        """Layout and micro-batch count as the options give them."""
        cell = self.cell
        options = Options(tp=cell.tp, pp=cell.pp, dp=cell.dp, microbatches=cell.microbatches)
        layout = choose_layout(model, self.slice(model), options)
        return LayoutChoice(layout=layout, microbatches=(cell.microbatches or (4,))[0])

    def choice(self, model: ModelSpec) -> LayoutChoice:
        """Layout and micro-batch count of this cell's instances: searched, or the reference's."""
        if model.name not in self._chosen:
            searched = self.cell.search_layout or len(self.cell.microbatches) != 1
            self._chosen[model.name] = self._search(model) if searched else self.reference(model)
        return self._chosen[model.name]

    def _search(self, model: ModelSpec) -> LayoutChoice:
        part = self.slice(model)
        workload = self.pricer.workload(self._sample(model))
        counts = self.cell.microbatches or (4, 8, 16)
        if self.cell.search_layout:
            choices = layout_choices(workload, part, counts)
        else:
            layout = self.reference(model).layout
            choices = replace(
                layout_choices(workload, part, counts),
                kept=tuple(LayoutChoice(layout=layout, microbatches=c) for c in counts if c >= layout.dp),
            )
        cost = self.cost_of(part)
        first = choices.kept[0]
        state = SystemState(
            workload=workload,
            cluster=part,
            layout=first.layout,
            microbatches=first.microbatches,
            evaluate=make_evaluate(cost, 0, 2),
        )
        plan = plan_over(make_policy(self.cell.policy, cost), self.cell.policy, state, choices)
        found = plan.instances[0]
        return LayoutChoice(layout=found.layout, microbatches=found.microbatches)

    def _sample(self, model: ModelSpec) -> list[TaskType]:
        """As many types as share an instance, evenly spaced by tokens among the first jobs of the backbone."""
        mine = (task_type(j) for j in self.trace if j.model == model.name)
        types = sorted(islice(mine, SAMPLE_JOBS), key=lambda t: (t.step_tokens, t.billed_len_tokens))
        count = min(self.cap, len(types))
        return [types[(2 * i + 1) * len(types) // (2 * count)] for i in range(count)]

    def merge(self) -> Callable[[TaskType], TaskType]:
        """Which type stands for a type: of those among the first jobs with as many tokens a step the one of middle length."""
        groups: dict[tuple[str, int], set[TaskType]] = {}
        for job in islice(self.trace, SAMPLE_JOBS):
            kind = task_type(job)
            groups.setdefault((kind.model, kind.step_tokens), set()).add(kind)
        middle = {
            key: sorted(group, key=lambda t: (t.billed_len_tokens, digest(t)))[len(group) // 2]
            for key, group in groups.items()
        }
        return lambda kind: middle.get((kind.model, kind.step_tokens), kind)

    def setup(self, stop: Callable[[], bool] | None = None) -> Setup:
        """What the engine is asked."""
        cell = self.cell
        return Setup(
            clusters=self.clusters,
            layout_of=lambda m: self.choice(m).layout,
            microbatches_of=lambda m: self.choice(m).microbatches,
            reference_of=self._reference_shape,
            tasks_per_instance=self.cap,
            max_instances=cell.max_instances,
            costs=FleetCosts(**{name: round(value) for name, value in cell.costs}),
            faults=self._faults(),
            until_ns=None if cell.until_days is None else round(cell.until_days * 86_400 * NS_PER_S),
            max_restarts=cell.max_restarts,
            stop=stop,
        )

    def _reference_shape(self, model: ModelSpec) -> InstanceShape:
        chosen = self.reference(model)
        return InstanceShape(
            model=model.name, slice=self.slice(model), layout=chosen.layout, microbatches=chosen.microbatches
        )

    def _faults(self) -> Any:
        """Those of the failure trace, or random ones."""
        if self.cell.faults:
            return read_faults(Path(self.cell.faults))
        rates = FaultRates(**dict(self.cell.fault_rates))
        none: tuple[Fault, ...] = ()
        return random_faults(self.clusters, rates, self.cell.seed) if self.cell.fault_rates else none

    def layouts(self) -> dict[str, dict[str, Any]]:
        """The layouts that were used, by backbone."""
        return {n: {"layout": c.layout.name, "microbatches": c.microbatches} for n, c in self._chosen.items()}


def default_gpus(model: ModelSpec, cluster: Cluster) -> int:
    """The smallest power of two of devices on which the backbone takes at most half of the memory, at most the cluster."""
    needed, size = model.parameters * model.element_bytes, 1
    while size * 2 <= cluster.size and needed > BACKBONE_SHARE * size * cluster.device.memory_bytes:
        size *= 2
    return size


def _opened(cell: Cell) -> Trace:
    """The trace under the cell's seed, every job on the cell's backbone where one is named."""
    trace, _ = open_given(replace(cell.given, seed=cell.given.seed + cell.seed))
    if cell.model is None:
        return trace
    model = model_preset(cell.model)

    def moved(job: Job) -> Job:
        length = min(job.billed_len_tokens, model.max_positions)
        return job if job.model == model.name else replace(job, model=model.name, billed_len_tokens=length)

    mapping = f"{trace.about.mapping}; every job runs on {model.name}".lstrip("; ")
    about = replace(trace.about, mapping=mapping)
    return Trace(about=about, open_jobs=lambda: map(moved, trace.open_jobs()), lengths=trace.lengths)
