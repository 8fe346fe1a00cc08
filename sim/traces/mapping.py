"""What a trace lacks is chosen from Mapping by a hash of (seed, job, column): a job's choice depends on no other job."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from statistics import NormalDist
from typing import TypeVar

from muxtune.sim.traces.record import Record
from muxtune.spec.errors import InputError
from muxtune.spec.jobs import Job
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.noun import noun
from muxtune.spec.peft.lora import LoRA

T = TypeVar("T")

#: MuxTune §5.4: mean and standard deviation of task durations, minutes; the lognormal shape is our reading of it.
MEAN_MINUTES, STD_MINUTES = 372.6, 612.9
NS_PER_MINUTE = 60_000_000_000
#: Bits of a hash that decide: a float holds one more.
WORD_BITS = 52
#: Columns of a job that no public trace has.
ALWAYS = ("model", "peft", "dataset", "billed_len_tokens", "global_batch_samples")


@noun
class Mapping:
    """The choices for invented columns; the default is nine task classes on the paper's backbone and data sets.

    `tenants` > 1 invents tenants where the source has none (else all are `default`). `deadline_slack` sets a deadline at
    arrival + slack × duration, `cancel_share` of the jobs is cancelled at a moment within the duration after arrival.
    """

    models: tuple[str, ...] = ("llama2-7b",)
    ranks: tuple[int, ...] = (16,)
    datasets: tuple[str, ...] = ("sst2", "openbookqa", "rte")
    batches: tuple[int, ...] = (16, 32, 64)
    tenants: int = 1
    mean_minutes: float = MEAN_MINUTES
    std_minutes: float = STD_MINUTES
    deadline_slack: float | None = None
    cancel_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("models", "ranks", "datasets", "batches"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        for name, values in (("ranks", self.ranks), ("batches", self.batches), ("tenants", (self.tenants,))):
            if min(values) < 1:
                raise ValueError(f"{name}={min(values)}: must be at least 1")
        for model in self.models:
            model_preset(model)
        for dataset in self.datasets:
            embedded_length(dataset)
        if not (1e-6 <= self.mean_minutes <= 1e8 and 0 <= self.std_minutes <= 1e8):
            raise ValueError(
                f"mean_minutes={self.mean_minutes}, std_minutes={self.std_minutes}: the mean must be from 1e-6 to 1e8, "
                "the standard deviation from 0 to 1e8"
            )
        if self.deadline_slack is not None and not 0 < self.deadline_slack <= 1e6:
            raise ValueError(f"deadline_slack={self.deadline_slack}: must be above 0, at most 1e6")
        if not 0 <= self.cancel_share <= 1:
            raise ValueError(f"cancel_share={self.cancel_share}: must be from 0 to 1")

    def sentence(self, invented: Sequence[str]) -> str:
        """How the invented columns were chosen."""
        said = [
            f"each job's model is one of {', '.join(self.models)}, its LoRA rank one of {_list(self.ranks)}, its data set "
            f"one of {', '.join(self.datasets)}, its global batch one of {_list(self.batches)} samples, equally likely by a "
            "hash of seed, job id and column; the billed length is the smallest power of two that covers 99.5 % of the data set"
        ]
        if "tenant" in invented:
            said.append(f"tenants are {self.tenants}, equally likely")
        if "duration_ns" in invented:
            said.append(
                f"durations are lognormal, mean {self.mean_minutes} min, standard deviation {self.std_minutes} min"
            )
        if "deadline_ns" in invented:
            said.append(f"deadlines lie {self.deadline_slack} durations after arrival")
        if "cancel_ns" in invented:
            said.append(f"{self.cancel_share:.0%} of the jobs are cancelled within their duration after arrival")
        return "; ".join(said)


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def lognormal_ns(mean_minutes: float, std_minutes: float, uniform: float) -> int:
    """The quantile `uniform` in (0, 1) of the lognormal of this mean and standard deviation, in ns.

    σ² = ln(1 + (std / mean)²), μ = ln mean − σ²/2.
    """
    variance = math.log1p((std_minutes / mean_minutes) ** 2)
    normal = NormalDist().inv_cdf(uniform)
    minutes = math.exp(math.log(mean_minutes) - variance / 2 + math.sqrt(variance) * normal)
    return round(minutes * NS_PER_MINUTE)


class Filler:
    """Makes Jobs of Records; `given` are the columns that the source has."""

    def __init__(self, mapping: Mapping, seed: int, given: frozenset[str]) -> None:
        self.mapping, self.seed, self.given = mapping, seed, given

    @cached_property
    def invented(self) -> tuple[str, ...]:
        """The columns that are not the source's, in the order of Job's fields."""
        made = self.mapping
        more = {
            "tenant": "tenant" not in self.given and made.tenants > 1,
            "duration_ns": "duration_ns" not in self.given,
            "deadline_ns": made.deadline_slack is not None,
            "cancel_ns": made.cancel_share > 0,
        }
        return (*ALWAYS, *(name for name, yes in more.items() if yes))

    @cached_property
    def billed(self) -> dict[tuple[str, str], int]:
        """(model, data set) → billed length: what covers 99.5 % of the samples, at most the model's positions."""
        covered = {name: embedded_length(name).covered_length() for name in self.mapping.datasets}
        return {
            (model, name): min(length, model_preset(model).max_positions)
            for model in self.mapping.models
            for name, length in covered.items()
        }

    @cached_property
    def peft(self) -> dict[int, LoRA]:
        """One noun a rank, shared by all jobs."""
        return {rank: LoRA(rank=rank) for rank in self.mapping.ranks}

    def jobs(self, records: Iterable[Record]) -> Iterator[Job]:
        """The Jobs of Records in order of submission; the first one's submission is 0 of the trace's clock.

        Raises:
            InputError: a time beyond 292 years.
        """
        origin_ns: int | None = None
        for record in records:
            origin_ns = record.submit_ns if origin_ns is None else origin_ns
            yield self.job(record, origin_ns)

    def job(self, record: Record, origin_ns: int) -> Job:
        """The Job of a Record whose trace starts at `origin_ns` of the source's clock.

        Raises:
            InputError: a time beyond 292 years.
        """
        try:
            return self._job(record, origin_ns)
        except ValueError as error:
            raise InputError(f"job {record.job_id}: {error}") from error

    def _job(self, record: Record, origin_ns: int) -> Job:
        made = self.mapping
        model = self._choice(made.models, record, "model")
        dataset = self._choice(made.datasets, record, "dataset")
        arrival_ns = record.submit_ns - origin_ns
        duration_ns = self._duration_ns(record) if record.duration_ns is None else record.duration_ns
        deadline_ns = cancel_ns = None
        if made.deadline_slack is not None:
            deadline_ns = arrival_ns + round(made.deadline_slack * duration_ns)
        if made.cancel_share and self._uniform(record, "cancelled") < made.cancel_share:
            cancel_ns = arrival_ns + round(self._uniform(record, "cancel_ns") * duration_ns)
        return Job(
            job_id=record.job_id,
            tenant=record.tenant or self._tenant(record),
            arrival_ns=arrival_ns,
            model=model,
            peft=self.peft[self._choice(made.ranks, record, "rank")],
            dataset=dataset,
            billed_len_tokens=self.billed[model, dataset],
            global_batch_samples=self._choice(made.batches, record, "global_batch_samples"),
            duration_ns=duration_ns,
            gpus_milli=record.gpus_milli,
            deadline_ns=deadline_ns,
            cancel_ns=cancel_ns,
        )

    def _tenant(self, record: Record) -> str:
        if "tenant" not in self.invented:
            return "default"
        return f"tenant-{self._choice(range(self.mapping.tenants), record, 'tenant')}"

    def _duration_ns(self, record: Record) -> int:
        return lognormal_ns(self.mapping.mean_minutes, self.mapping.std_minutes, self._uniform(record, "duration_ns"))

    def _choice(self, values: Sequence[T], record: Record, column: str) -> T:
        return values[0] if len(values) == 1 else values[len(values) * self._word(record, column) >> WORD_BITS]

    def _uniform(self, record: Record, column: str) -> float:
        """In (0, 1); exact."""
        return float(2 * self._word(record, column) + 1) / float(1 << WORD_BITS + 1)

    def _word(self, record: Record, column: str) -> int:
        text = f"{self.seed}\n{record.job_id}\n{column}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 64 - WORD_BITS
