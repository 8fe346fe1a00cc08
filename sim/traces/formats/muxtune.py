"""Our own format of PEFT jobs, JSON lines: a TraceHeader, then one Job a line in order of arrival (docs/trace-format.md)."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from muxtune.sim.traces.formats.base import TraceFormat, TraceOptions
from muxtune.sim.traces.rows import Tally, head_line, open_text
from muxtune.spec.errors import InputError
from muxtune.spec.files import validate_text
from muxtune.spec.jobs import Job, Trace, TraceHeader
from muxtune.spec.lengths import LengthDistribution, embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.noun import plain

MAGIC = "muxtune_trace"


class Muxtune(TraceFormat):
    """Nothing is invented here: the header says what was."""

    SUFFIX = ".jsonl"
    EXAMPLE = (
        '{"muxtune_trace": 1, "name": "three", "source": "written by hand"}\n'
        '{"job_id": "a", "arrival_ns": 0, "model": "tiny-llama", "peft": {"kind": "lora", "rank": 8}, "dataset": "sst2", '
        '"billed_len_tokens": 64, "global_batch_samples": 8, "steps": 100}\n'
        '{"job_id": "b", "arrival_ns": 5, "model": "tiny-llama", "peft": {"kind": "lora", "rank": 4}, "dataset": "rte", '
        '"billed_len_tokens": 256, "global_batch_samples": 8, "tenant": "acme", "duration_ns": 60000000000, '
        '"gpus_milli": 500, "deadline_ns": 90000000000}\n'
        '{"job_id": "c", "arrival_ns": 5, "model": "tiny-llama", "peft": {"kind": "lora", "targets": ["qkv"]}, '
        '"dataset": "rte", "billed_len_tokens": 256, "global_batch_samples": 8, "steps": 7, "cancel_ns": 6, "weight": 2.0}\n'
    )
    SPOILT = (EXAMPLE + EXAMPLE.splitlines()[3].replace('"steps": 7', '"steps": 0') + "\n", "line 5", "steps")

    def matches(self, path: Path) -> bool:
        """Whether the first line is a header."""
        line = head_line(path)
        return line.startswith("{") and f'"{MAGIC}"' in line

    def open(self, path: Path, options: TraceOptions, tally: Tally) -> Trace:
        """The trace of a file.

        Raises:
            InputError: no header, or options of a mapping: nothing is left to invent.
        """
        if options.mapping is not None:
            raise InputError(f"{path}: is a muxtune trace, which lacks nothing: leave the options of the mapping away")
        with open_text(path) as file:
            about = validate_text(TraceHeader, file.readline(), f"{path}: line 1")
        about = about if options.gpu_rule is None else dataclasses.replace(about, gpu_rule=options.gpu_rule)
        tables = {table.name: table for table in about.datasets}
        return Trace(
            about=about, open_jobs=partial(_jobs, path, tables, tally), lengths=partial(_lengths, tables, str(path))
        )


def _lengths(tables: dict[str, LengthDistribution], place: str, name: str) -> LengthDistribution:
    if name in tables:
        return tables[name]
    try:
        return embedded_length(name)
    except InputError as error:
        more = f"; the header has {', '.join(tables)}" if tables else "; or put its table into the header's datasets"
        raise InputError(f"{place}: dataset: {error}{more}") from error


def _jobs(path: Path, tables: dict[str, LengthDistribution], tally: Tally) -> Iterator[Job]:
    tally.clear()
    known: set[str] = set()
    last_ns = 0
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if number > 1 and line.strip():
                job = tally.attempt(partial(_job, f"{path}: line {number}", line, tables, known, last_ns))
                if job is not None:
                    last_ns = job.arrival_ns
                    yield job


def _job(place: str, line: str, tables: dict[str, LengthDistribution], known: set[str], last_ns: int) -> Job:
    job = validate_text(Job, line, place)
    if job.job_id in known:
        raise InputError(f"{place}: job_id = {job.job_id!r}: occurs twice: give each job its own")
    if job.arrival_ns < last_ns:
        raise InputError(
            f"{place}: arrival_ns = {job.arrival_ns}: the job before arrives at {last_ns}: sort the lines by arrival_ns"
        )
    try:
        positions = model_preset(job.model).max_positions
    except InputError as error:
        raise InputError(f"{place}: model: {error}") from error
    if job.billed_len_tokens > positions:
        raise InputError(
            f"{place}: billed_len_tokens = {job.billed_len_tokens}: exceeds the {positions} positions of {job.model}; lower it"
        )
    _lengths(tables, place, job.dataset)
    known.add(job.job_id)
    return job


def job_line(job: Job) -> str:
    """A job as its line, without what it lacks."""
    return json.dumps({k: v for k, v in plain(job).items() if v is not None}, ensure_ascii=False, allow_nan=False)


def write_trace(trace: Trace, path: Path, required: int = 0) -> int:
    """Write a trace in our format (gzipped where the name ends in .gz) while it is read; the number of jobs.

    A kill or a bad row leaves the old file or none, never half of one. Equal traces give equal bytes.

    Raises:
        InputError: a bad row, or fewer than `required` jobs.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with part.open("wb") as raw:
            file: IO[bytes] = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw  # type: ignore[assignment]
            file.write((json.dumps(plain(trace.about), ensure_ascii=False, allow_nan=False) + "\n").encode())
            for job in trace:
                file.write((job_line(job) + "\n").encode())
                count += 1
            file.flush()
            if file is not raw:
                file.close()
        if count < required:
            raise InputError(f"{trace.about.name}: {count} jobs are left to write, at least {required} are needed")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count
