"""The user's workload file: a backbone, tasks, and data sets by name or path (DESIGN §11)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from muxtune.sim.traces.lengths import read_lengths
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.files import read_data, validate
from muxtune.spec.hf_config import read_model
from muxtune.spec.lengths import LengthDistribution, embedded_lengths
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.noun import noun, plain
from muxtune.spec.peft import PeftSpec
from muxtune.spec.schedule import Schedule
from muxtune.spec.task import Task, Workload
from muxtune.spec.units import MAX_NS, NS_PER_S, seconds_to_ns

#: Seconds that fit 64 bits of nanoseconds.
LONGEST_S = MAX_NS // NS_PER_S
#: A data set reference with one of these endings, or with a slash, is meant as a path.
DATA_SUFFIXES = (".parquet", ".csv", ".jsonl")


@noun
class TaskEntry:
    """One task as a user writes it: times in seconds, and a billed length only where the default is not wanted."""

    task_id: str
    peft: PeftSpec
    dataset: str
    global_batch_samples: int
    billed_len_tokens: int | None = None
    tenant: str = "default"
    steps: int = 1000
    arrival_s: float = 0.0
    weight: float = 1.0
    deadline_s: float | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Schedule = Schedule()
    loss_scale: float = 1.0
    loss_scale_growth_steps: int = 0

    def __post_init__(self) -> None:
        for field in ("arrival_s", "deadline_s"):
            seconds = getattr(self, field) or 0.0
            if seconds < 0:
                raise ValueError(f"{field}={seconds}: must not be negative")
            if seconds > LONGEST_S:
                raise ValueError(f"{field}={seconds}: must be at most {LONGEST_S} (292 years)")


@noun
class WorkloadFile:
    """A workload file after its model preset was filled in."""

    model: ModelSpec
    tasks: tuple[TaskEntry, ...]
    name: str = ""


def read_workload(path: Path) -> Workload:
    """Read a workload file and resolve its model preset and data sets.

    `dataset` is an embedded table (`rte`, or `rte@llama2` for another tokenizer's counts) or a file relative to the
    workload file (`@TOKENIZER` picks that tokenizer's columns). The billed length defaults to the smallest power of two
    that covers 99.5 % of the samples, at most the model's positions.

    Raises:
        InputError: the file, the path inside it, the value and the remedy.
    """
    data = read_data(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping with model and tasks")
    return workload_of(data, path)


def workload_of(data: dict[str, Any], path: Path) -> Workload:
    """The workload of a file's data; see `read_workload`."""
    file = validate(WorkloadFile, {**data, "model": _model(data.get("model"), path)}, str(path))
    datasets: dict[str, LengthDistribution] = {}
    tasks: list[Task] = []
    for index, entry in enumerate(file.tasks):
        place = f"{path}: tasks.{index}"
        if entry.dataset not in datasets:
            datasets[entry.dataset] = _dataset(entry.dataset, path.parent, place)
        tasks.append(_task(entry, datasets[entry.dataset], file.model, place))
    try:
        return Workload(
            name=file.name or path.stem, model=file.model, datasets=tuple(datasets.values()), tasks=tuple(tasks)
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _model(value: Any, path: Path) -> Any:
    """A preset's shapes where the file names one; a mapping is left to validation."""
    if value is None:
        raise InputError(f"{path}: model is missing: name a preset or give its shapes")
    if not isinstance(value, str):
        return value
    folder = path.parent / value
    if folder.is_dir():
        return plain(read_model(folder))
    try:
        return plain(model_preset(value))
    except UnknownKeyError as error:
        raise InputError(f"{path}: model: {error}") from error


def _dataset(reference: str, folder: Path, place: str) -> LengthDistribution:
    """The lengths behind a reference, named by the reference itself so that two of them never clash."""
    embedded = embedded_lengths()
    if reference in embedded:
        return dataclasses.replace(embedded[reference], name=reference)
    stem, _, tokenizer = reference.rpartition("@")
    given = [(folder / reference, None), *([(folder / stem, tokenizer)] if stem else [])]
    for path, named in given:
        if path.is_file():
            return dataclasses.replace(read_lengths(path, named), name=reference)
        if path.is_dir():
            raise InputError(f"{place}: dataset {reference}: {path} is a directory: give the path of a file in it")
    if stem in embedded:
        tokenizers = ", ".join(sorted(k.partition("@")[2] for k in embedded if k.startswith(f"{stem}@")))
        raise InputError(
            f"{place}: dataset {stem} has no counts of tokenizer {tokenizer!r}: it has those of {tokenizers}"
        )
    file_name = stem or reference
    if "/" in file_name or "\\" in file_name or file_name.endswith(DATA_SUFFIXES):
        raise InputError(f"{place}: dataset {reference}: file not found: {given[-1][0]} does not exist")
    known = ", ".join(sorted(k for k in embedded if "@" not in k))
    raise InputError(f"{place}: unknown dataset {reference!r}: known are {known}; or give the path of a file")


def _task(entry: TaskEntry, lengths: LengthDistribution, model: ModelSpec, place: str) -> Task:
    try:
        return Task(
            task_id=entry.task_id,
            peft=entry.peft,
            dataset=entry.dataset,
            billed_len_tokens=entry.billed_len_tokens
            if entry.billed_len_tokens is not None
            else min(lengths.covered_length(), model.max_positions),
            global_batch_samples=entry.global_batch_samples,
            tenant=entry.tenant,
            steps=entry.steps,
            arrival_ns=seconds_to_ns(entry.arrival_s),
            weight=entry.weight,
            deadline_ns=None if entry.deadline_s is None else seconds_to_ns(entry.deadline_s),
            learning_rate=entry.learning_rate,
            weight_decay=entry.weight_decay,
            clip_norm=entry.clip_norm,
            optimizer=entry.optimizer,
            schedule=entry.schedule,
            loss_scale=entry.loss_scale,
            loss_scale_growth_steps=entry.loss_scale_growth_steps,
        )
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
