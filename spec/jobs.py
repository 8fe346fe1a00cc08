"""Job and Trace: PEFT jobs that arrive over time; steps = duration / solo step time, the one rule that turns time into work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from muxtune.spec.lengths import LengthDistribution
from muxtune.spec.noun import noun
from muxtune.spec.peft import PeftSpec
from muxtune.spec.task import Task
from muxtune.spec.units import check_range

#: What is done with the GPU count of a source trace.
GpuRule = Literal["ignore", "scale"]

WORK_RULE = (
    "a job that has a duration instead of steps asks for duration × the solo step rate of hf-peft on the reference "
    "instance: steps = max(1, round(duration / solo step time))"
)
GPU_RULES: dict[GpuRule, str] = {
    "ignore": "the source's GPU count is kept for statistics only: its duration is taken as it is",
    "scale": "the duration is multiplied by the source's GPU count over the GPUs of the reference instance",
}


@noun
class Job:
    """One tenant's fine-tuning job of a trace. Times are on the trace's clock, 0 at its origin.

    `model` is a preset's name, `dataset` a table of the trace or an embedded one. Work is given as `steps`, or as the
    `duration_ns` that the source trace saw (WORK_RULE); never both. `gpus_milli` is the source's GPU count in thousandths.
    The job leaves unfinished at `cancel_ns`; finishing after `deadline_ns` is a miss.
    """

    job_id: str
    arrival_ns: int
    model: str
    peft: PeftSpec
    dataset: str
    billed_len_tokens: int
    global_batch_samples: int
    tenant: str = "default"
    steps: int | None = None
    duration_ns: int | None = None
    gpus_milli: int | None = None
    deadline_ns: int | None = None
    weight: float = 1.0
    cancel_ns: int | None = None

    def __post_init__(self) -> None:
        for name in ("job_id", "tenant", "model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give a name")
        if (self.steps is None) == (self.duration_ns is None):
            raise ValueError("give either steps or duration_ns, one of the two")
        for name, least in (("billed_len_tokens", 1), ("global_batch_samples", 1), ("steps", 1), ("duration_ns", 0)):
            check_range(name, getattr(self, name), least)
        check_range("arrival_ns", self.arrival_ns, 0)
        check_range("gpus_milli", self.gpus_milli, 0)
        for name in ("deadline_ns", "cancel_ns"):
            check_range(name, getattr(self, name), self.arrival_ns)
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight}: must be above 0")


@noun
class TraceHeader:
    """What is true of a whole trace: where it comes from and which columns were invented with which seed.

    `muxtune_trace` is the version of the format, `mapping` says how invented columns were chosen; `datasets` are the length
    tables that jobs name beside embedded ones.
    """

    muxtune_trace: Literal[1] = 1
    name: str
    source: str
    invented: tuple[str, ...] = ()
    mapping: str = ""
    seed: int = 0
    gpu_rule: GpuRule = "ignore"
    datasets: tuple[LengthDistribution, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.invented) - {f.name for f in dataclasses.fields(Job)})
        if unknown:
            raise ValueError(f"invented={list(self.invented)}: {unknown[0]} is no column of a job")
        names = [d.name for d in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets={names}: a name occurs twice")

    def statements(self) -> tuple[str, ...]:
        """What every result over this trace has to say."""
        columns = f"invented columns (seed {self.seed}): {', '.join(self.invented)}" if self.invented else ""
        said = (columns or "no column is invented", self.mapping, WORK_RULE, GPU_RULES[self.gpu_rule])
        return tuple(text for text in said if text)


@noun
class Trace:
    """Jobs in order of arrival, read when they are asked for: each iteration opens the source again.

    `open_jobs` may raise InputError while it goes on. `lengths` gives the token lengths behind a job's `dataset`.
    """

    about: TraceHeader
    open_jobs: Callable[[], Iterator[Job]]
    lengths: Callable[[str], LengthDistribution]

    def __iter__(self) -> Iterator[Job]:
        return self.open_jobs()


def job_steps(job: Job, solo_step_ns: int, gpu_rule: GpuRule = "ignore", reference_gpus: int = 1) -> int:
    """Optimizer steps of a job whose step takes `solo_step_ns` alone under hf-peft on the reference instance (WORK_RULE).

    Rounded half to even, in integers. A job without a GPU count is not scaled.

    Raises:
        ValueError: solo_step_ns or reference_gpus is below 1.
    """
    if solo_step_ns < 1 or reference_gpus < 1:
        raise ValueError(f"solo_step_ns={solo_step_ns}, reference_gpus={reference_gpus}: must be at least 1")
    if job.steps is not None:
        return job.steps
    work, unit = job.duration_ns or 0, solo_step_ns
    if gpu_rule == "scale" and job.gpus_milli is not None:
        work, unit = work * job.gpus_milli, unit * 1000 * reference_gpus
    whole, rest = divmod(work, unit)
    up = 2 * rest > unit or (2 * rest == unit and whole % 2 == 1)
    return max(1, whole + up)


def job_task(job: Job, steps: int) -> Task:
    """The job as a Task of a Workload, with this many steps."""
    return Task(
        task_id=job.job_id,
        tenant=job.tenant,
        peft=job.peft,
        dataset=job.dataset,
        billed_len_tokens=job.billed_len_tokens,
        global_batch_samples=job.global_batch_samples,
        steps=steps,
        arrival_ns=job.arrival_ns,
        weight=job.weight,
        deadline_ns=job.deadline_ns,
    )
