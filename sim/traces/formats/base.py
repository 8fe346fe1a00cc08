"""What a trace format is: it knows its files and opens them as a Trace, streaming; SourceFormat turns rows into Records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from muxtune.sim.traces.mapping import Filler, Mapping
from muxtune.sim.traces.order import by_submission
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row, Tally, csv_rows, head_line, named
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.jobs import GpuRule, Job, Trace, TraceHeader
from muxtune.spec.lengths import embedded_length
from muxtune.spec.noun import noun
from muxtune.spec.registry import plugins


class Reading:
    """One row of the source: called, it gives its Record, or a text that says why the row is no job; InputError for a bad row."""

    __slots__ = ("make", "place", "record")

    def __init__(self, place: str, make: Callable[[], Row], record: Callable[[Row], Record | str]) -> None:
        self.place, self.make, self.record = place, make, record

    def __call__(self) -> Record | str:
        """The row's Record."""
        return self.record(self.make())


@noun
class TraceOptions:
    """How a trace is read. `mapping` chooses what the source lacks (None: the default one)."""

    mapping: Mapping | None = None
    seed: int = 0
    gpu_rule: GpuRule | None = None


class TraceFormat:
    """Base of every format.

    `EXAMPLE` is a small file of at least three jobs, `SPOILT` one with a bad row, its place and its column: the laws read both.
    """

    SUFFIX = ".csv"
    EXAMPLE: str = ""
    SPOILT: tuple[str, str, str] = ("", "", "")

    def matches(self, path: Path) -> bool:
        """Whether a file looks like this format."""
        raise NotImplementedError

    def open(self, path: Path, options: TraceOptions, tally: Tally) -> Trace:
        """The trace of a file; what reading leaves out is counted in `tally`, anew at each iteration.

        Raises:
            InputError: the file as a whole cannot be read; while iterating, a bad row by file, line, column and value.
        """
        raise NotImplementedError

    def write_example(self, path: Path, spoilt: bool = False) -> None:
        """Write EXAMPLE (or SPOILT) as a file of this format."""
        path.write_text(self.SPOILT[0] if spoilt else self.EXAMPLE, encoding="utf-8")


class SourceFormat(TraceFormat):
    """A public trace of black-box jobs: rows become Records, and what they lack is invented."""

    #: What a row is, and how its duration and GPUs were found.
    NOTE = ""

    def readings(self, path: Path) -> Iterator[Reading]:
        """One Reading a row, in the file's order. InputError: the file as a whole cannot be read."""
        raise NotImplementedError

    def gives(self, path: Path) -> frozenset[str]:
        """Which of tenant, duration_ns and gpus_milli the file has."""
        raise NotImplementedError

    def open(self, path: Path, options: TraceOptions, tally: Tally) -> Trace:
        """The trace of a file: jobs by submission, the first at 0."""
        filler = Filler(options.mapping or Mapping(), options.seed, self.gives(path))
        about = TraceHeader(
            name=Path(path.name.removesuffix(".gz")).stem,
            source=f"{path.name}: {sys.modules[type(self).__module__].__doc__ or ''} {self.NOTE}",
            invented=filler.invented,
            mapping=filler.mapping.sentence(filler.invented),
            seed=options.seed,
            gpu_rule=options.gpu_rule or "ignore",
        )

        def jobs() -> Iterator[Job]:
            tally.clear()
            return filler.jobs(by_submission(self.records(path, tally)))

        return Trace(about=about, open_jobs=jobs, lengths=embedded_length)

    def records(self, path: Path, tally: Tally) -> Iterator[Record]:
        """Every job, in the file's order; rows that are no jobs and skipped bad rows are counted in `tally`.

        Raises:
            InputError: a bad row, by file, line, column and value.
        """
        known: set[str] = set()
        timed = "duration_ns" in self.gives(path)
        for reading in self.readings(path):
            found = tally.attempt(partial(_once, reading, known))
            if isinstance(found, str):
                tally.leave_out(found)
            elif found is not None and timed and found.duration_ns is None:
                tally.leave_out("has no duration")
            elif found is not None:
                yield found


def _once(reading: Reading, known: set[str]) -> Record | str:
    found = reading()
    if isinstance(found, Record):
        if found.job_id in known:
            raise InputError(f"{reading.place}: job id {found.job_id!r} occurs twice: give each job its own")
        known.add(found.job_id)
    return found


class CsvFormat(SourceFormat):
    """A CSV whose header tells what it is: it has all of `COLUMNS`."""

    COLUMNS: tuple[str, ...] = ()
    GIVES: frozenset[str] = frozenset()

    def matches(self, path: Path) -> bool:
        """Whether the first line has the columns."""
        names = head_line(path).split(",")
        return set(self.COLUMNS) <= set(names)

    def gives(self, path: Path) -> frozenset[str]:
        """The same for every file."""
        return self.GIVES

    def header(self, path: Path) -> tuple[str, ...]:
        """The columns of a file that does not name them."""
        return ()

    def readings(self, path: Path) -> Iterator[Reading]:
        """One Reading a line."""
        lines = csv_rows(path, self.COLUMNS, self.header(path))
        _, _, names = next(lines)
        for place, number, fields in lines:
            yield Reading(place, partial(named, place, number, names, fields), self.record)

    def record(self, row: Row) -> Record | str:
        """The job of a row, or why it is none."""
        raise NotImplementedError


@cache
def trace_formats() -> dict[str, type[TraceFormat]]:
    """Every format by key: the files of this folder, then the entry points in `muxtune.traces`."""
    return plugins("traces", Path(__file__).parent, "muxtune.sim.traces.formats", TraceFormat)


def find_format(path: Path, key: str = "auto") -> tuple[str, TraceFormat]:
    """(key, format) of a file: the one named, or the one that it looks like.

    Raises:
        UnknownKeyError: no such format. InputError: no such file, or it looks like none, or like several.
    """
    formats = trace_formats()
    if key not in ("auto", *formats):
        raise UnknownKeyError("trace format", key, ("auto", *formats))
    if not path.is_file():
        kind = "is a directory: give the name of a trace file" if path.is_dir() else "file not found"
        raise InputError(f"{path}: {kind}")
    if key != "auto":
        return key, formats[key]()
    found = [name for name, made in formats.items() if made().matches(path)]
    if len(found) != 1:
        looks = "like several formats" if found else "like no known trace format"
        raise InputError(f"{path}: looks {looks}: name one with --format, of {', '.join(found or formats)}")
    return found[0], formats[found[0]]()
