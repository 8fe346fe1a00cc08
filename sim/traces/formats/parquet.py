"""Parquet with the columns job_id (or request_id), submit_time_s, and where known duration_s, num_gpus, gpu_milli, tenant."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet

from muxtune.sim.traces.formats.base import Reading, SourceFormat
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row
from muxtune.spec.errors import InputError

IDS = ("job_id", "request_id")
COLUMNS = {"tenant": "tenant", "duration_s": "duration_ns", "num_gpus": "gpus_milli"}
USED = (*IDS, "submit_time_s", *COLUMNS, "gpu_milli")
ROWS_AT_ONCE = 10_000


class Parquet(SourceFormat):
    """One row a job; a column that is null in every row counts as missing. Jobs that ask for no GPU are left out."""

    SUFFIX = ".parquet"
    NOTE = "duration_s is the execution, tenant the owner; a job with one GPU counts with gpu_milli of it where that stands"
    EXAMPLE = "a 0 60 1\nb 30.5 120 8\nc 30.5 9 2\n"
    SPOILT = ("a 0 60 1\nb 30.5 -1 8\n", "row 1", "duration_s")

    def write_example(self, path: Path, spoilt: bool = False) -> None:
        """A table of the words of EXAMPLE or SPOILT."""
        text = self.SPOILT[0] if spoilt else self.EXAMPLE
        columns = list(zip(*(line.split() for line in text.splitlines()), strict=True))
        names = ("job_id", "submit_time_s", "duration_s", "num_gpus")
        arrays = [list(columns[0]), *([float(v) for v in column] for column in columns[1:])]
        pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, arrays, strict=True))), path)

    def matches(self, path: Path) -> bool:
        """Whether it is parquet with an id and a submission."""
        try:
            names = set(pyarrow.parquet.read_schema(path).names)
        except (OSError, pyarrow.ArrowException):
            return False
        return "submit_time_s" in names and bool(names & set(IDS))

    def gives(self, path: Path) -> frozenset[str]:
        """The columns that are there and not null in every row."""
        with _open(path) as file:
            names = set(file.schema_arrow.names) & set(COLUMNS)
            filled = (
                {n for batch in file.iter_batches(columns=sorted(names)) for n in _filled(batch)} if names else set()
            )
        return frozenset(COLUMNS[name] for name in filled)

    def readings(self, path: Path) -> Iterator[Reading]:
        """One Reading a row."""
        with _open(path) as file:
            names = [n for n in USED if n in file.schema_arrow.names]
            if not set(names) & set(IDS) or "submit_time_s" not in names:
                raise InputError(f"{path}: columns job_id and submit_time_s are needed; it has {', '.join(names)}")
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
                for values in batch.to_pylist():
                    place = f"{path}: row {number}"
                    yield Reading(place, partial(Row, place, number, values), self.record)
                    number += 1

    def record(self, row: Row) -> Record | str:
        """The job of a row, or why it is none."""
        gpus_milli = row.gpus_milli("num_gpus")
        if gpus_milli == 1000:
            share = row.number_of("gpu_milli", 1, "give thousandths of a GPU, at least 0")
            gpus_milli = gpus_milli if share is None else share
        submit_ns = row.submitted(row.seconds_ns("submit_time_s"), "submit_time_s")
        duration_ns = row.seconds_ns("duration_s")
        if gpus_milli == 0:
            return "asks for no GPU"
        return Record(
            job_id=row.name(next(n for n in IDS if n in row.values)),
            submit_ns=submit_ns,
            duration_ns=duration_ns,
            gpus_milli=gpus_milli,
            tenant=row.text("tenant"),
        )


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet: {error}") from error


def _filled(batch: pyarrow.RecordBatch) -> list[str]:
    return [name for name in batch.schema.names if batch.column(name).null_count < batch.num_rows]
