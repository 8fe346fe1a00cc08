"""Nouns of a cluster under load, and what a cluster policy sees of it: jobs, instances, tenants, predicted gains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from muxtune.spec.cluster import Cluster
from muxtune.spec.estimate import Estimate
from muxtune.spec.jobs import Job
from muxtune.spec.layout import Layout
from muxtune.spec.noun import noun
from muxtune.spec.peft import PeftSpec
from muxtune.spec.units import NS_PER_S


@noun
class TaskType:
    """All of a job that decides how fast it runs: jobs of one type are interchangeable to a planner."""

    model: str
    peft: PeftSpec
    dataset: str
    billed_len_tokens: int
    global_batch_samples: int

    @property
    def step_tokens(self) -> int:
        """Billed tokens of one optimizer step."""
        return self.billed_len_tokens * self.global_batch_samples


def task_type(job: Job) -> TaskType:
    """The type of a job."""
    return TaskType(
        model=job.model,
        peft=job.peft,
        dataset=job.dataset,
        billed_len_tokens=job.billed_len_tokens,
        global_batch_samples=job.global_batch_samples,
    )


@noun
class InstanceShape:
    """What an instance looks like to a planner: its backbone, its slice of the cluster with the links there, its layout.

    `frequency_mhz` 0 is the device's reference clock.
    """

    model: str
    slice: Cluster
    layout: Layout
    microbatches: int
    frequency_mhz: int = 0


#: Predicts one iteration of these tasks (one step of each) on an instance. NoAnswerError where they do not fit.
Pricer = Callable[[Sequence[TaskType], InstanceShape], Estimate]


@noun
class FleetCosts:
    """Times that changes of an instance take. All are assumptions unless measured values are given.

    A change of the set of tasks stops an instance at the end of an iteration for `replan_ns` + `join_ns` a task that comes +
    `leave_ns` a task that goes. An instance starts in `start_ns` + backbone bytes / `load_bytes_per_s`. A task whose instance
    was lost or left joins elsewhere after `migrate_ns`, in which its checkpoint is read. Between two iterations the host takes
    `between_ns` + `between_task_ns` a task (drawing samples, messages), which a plan's price does not have.
    """

    replan_ns: int = 2 * NS_PER_S
    join_ns: int = NS_PER_S
    leave_ns: int = NS_PER_S // 2
    start_ns: int = 20 * NS_PER_S
    load_bytes_per_s: int = 1_000_000_000
    migrate_ns: int = 5 * NS_PER_S
    checkpoint_ns: int = 600 * NS_PER_S
    between_ns: int = 0
    between_task_ns: int = 0

    def __post_init__(self) -> None:
        for name in ("replan_ns", "join_ns", "leave_ns", "start_ns", "migrate_ns", "between_ns", "between_task_ns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("load_bytes_per_s", "checkpoint_ns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


FREE = FleetCosts(replan_ns=0, join_ns=0, leave_ns=0, start_ns=0, load_bytes_per_s=2**62, migrate_ns=0)


@noun
class Fault:
    """Devices that fail (`slowdown` None) or compute `slowdown` times slower, from `at_ns` for `lasts_ns`."""

    at_ns: int
    lasts_ns: int
    devices: tuple[int, ...]
    slowdown: float | None = None

    def __post_init__(self) -> None:
        if self.at_ns < 0 or self.lasts_ns < 1:
            raise ValueError(f"at_ns={self.at_ns}, lasts_ns={self.lasts_ns}: from 0 on, and at least 1 ns long")
        if not self.devices:
            raise ValueError("devices is empty: name at least one")
        if self.slowdown is not None and self.slowdown < 1.0:
            raise ValueError(f"slowdown={self.slowdown}: must be at least 1")


class JobView(Protocol):
    """A job in the system, as a policy may read it. Times are ns on the trace's clock, `tokens` billed ones of a step."""

    index: int
    tenant: str
    model: str
    arrival_ns: int
    weight: float
    deadline_ns: int | None
    steps: int
    tokens: int
    restarts: int
    leaving: bool

    @property
    def instance(self) -> InstanceView | None:
        """Where it runs; None while it waits."""


class InstanceView(Protocol):
    """A running or starting instance, as a policy may read it."""

    number: int
    model: str
    pool: int

    @property
    def gpus(self) -> int:
        """Devices it stands on."""

    @property
    def load(self) -> int:
        """Tasks that run on it or are about to join, without those about to leave."""

    @property
    def jobs(self) -> Iterable[JobView]:
        """The tasks of `load`."""


class FleetView(Protocol):
    """The whole system at one moment, and what the simulator predicts of a change."""

    now_ns: int
    capacity: int

    def instances(self, model: str) -> Sequence[InstanceView]:
        """Instances of a backbone that accept tasks, oldest first."""

    def has_room(self, instance: InstanceView, job: JobView) -> bool:
        """Whether the job may join: the cap on tasks, and memory."""

    def launchable(self, model: str) -> Sequence[int]:
        """Pools (device types) with devices free for one more instance of this backbone."""

    def launch(self, model: str, pool: int) -> InstanceView:
        """Start an instance there; it accepts tasks at once and runs them when the backbone is loaded."""

    def rate(self, instance: InstanceView, more: JobView | None = None) -> float:
        """Predicted billed tokens per second of the instance's load, with `more` beside it."""

    def new_rate(self, model: str, pool: int, job: JobView) -> float:
        """Predicted billed tokens per second of the job alone on a new instance in this pool."""

    def iteration_ns(self, instance: InstanceView, more: JobView | None = None) -> int:
        """Predicted time of one iteration of the instance's load, with `more` beside it."""

    def remaining_steps(self, job: JobView) -> int:
        """Optimizer steps that are left at the end of the iteration that runs."""

    def attained_ns(self, job: JobView) -> int:
        """GPU time it had: its share of its instances' devices."""

    def alone_ns(self, job: JobView) -> int:
        """Time that all steps of a job take alone (hf-peft on the reference instance)."""

    def running(self, tenant: str) -> int:
        """Tasks of a tenant that run or are about to."""

    def service_ns(self, tenant: str) -> int:
        """GPU time that a tenant had so far."""

    def waiting(self) -> int:
        """Jobs that wait."""

    def clocks_mhz(self, instance: InstanceView) -> Sequence[int]:
        """Core clocks of the instance's device, the reference first."""


class FleetRules(Protocol):
    """What the engine asks of a cluster policy (policies/cluster/base.py has the defaults)."""

    preempts: bool
    config: Any

    @property
    def round_ns(self) -> int:
        """Time between two rounds of preemption; 0: only when a job arrives."""

    @property
    def idle_stop_ns(self) -> int | None:
        """An instance without tasks for so long gives its devices back; None: only when another backbone needs them."""

    def admit(self, job: JobView, fleet: FleetView) -> str | None:
        """None, or why the job is refused on arrival."""

    def group(self, job: JobView) -> str:
        """The line in which a job waits."""

    def key(self, job: JobView, fleet: FleetView) -> Any:
        """Place in its line, least first; fixed while the job waits."""

    def group_key(self, group: str, head: JobView, fleet: FleetView) -> Any:
        """Which line is served first, least first."""

    def place(self, job: JobView, fleet: FleetView) -> InstanceView | None:
        """Where the job runs now; None: it waits."""

    def victim(self, job: JobView, fleet: FleetView) -> JobView | None:
        """A running job of the same backbone that makes room for this one; None: nobody does."""

    def grows(self, instance: InstanceView, fleet: FleetView) -> bool:
        """Whether an instance takes twice its devices now, if they are free; one that has grown and no longer grows shrinks."""

    def clock_mhz(self, instance: InstanceView, fleet: FleetView) -> int:
        """Core clock of an instance; 0: the device's reference clock."""
