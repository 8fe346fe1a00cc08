"""Rows of a source file with their place: typed columns, and one sentence for what is wrong with one."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import pyarrow

from muxtune.spec.errors import InputError
from muxtune.spec.units import MAX_NS, NS_PER_S

T = TypeVar("T")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Date, time, fraction of a second (Azure has seven digits), offset.
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?")
#: What reading a damaged file raises.
UNREADABLE = (OSError, UnicodeDecodeError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException)
#: Texts with which sources say that they have no value.
NOTHING = ("", "None", "nan", "NaN", "NULL")


@dataclass(slots=True)
class Tally:
    """What reading left out: `left_out` rows by reason (they are no jobs), and bad rows where `skip_bad` lets them pass."""

    skip_bad: bool = False
    bad: int = 0
    first_bad: str = ""
    left_out: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Count anew."""
        self.bad, self.first_bad, self.left_out = 0, "", {}

    def leave_out(self, reason: str) -> None:
        """Count a row that is no job."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What `make` gives; None for a bad row, which is counted where bad rows are skipped.

        Raises:
            InputError: the row is bad and bad rows are not skipped.
        """
        try:
            return make()
        except InputError as error:
            if not self.skip_bad:
                raise
            self.bad += 1
            self.first_bad = self.first_bad or str(error)
            return None


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `place` names file and line, `values` are its columns."""

    place: str
    number: int
    values: Mapping[str, Any]

    def wrong(self, column: str, remedy: str) -> InputError:
        """The complaint about a column's value."""
        value = repr(self.values.get(column))
        return InputError(f"{self.place}: column {column} = {value if len(value) < 80 else value[:80] + '…'}: {remedy}")

    def text(self, column: str) -> str | None:
        """A text; None where there is none."""
        value = self.values.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        text = str(value).strip()
        return None if text in NOTHING else text

    def name(self, column: str) -> str:
        """A text that must be there."""
        text = self.text(column)
        if text is None:
            raise self.wrong(column, "give a name")
        return text

    def number_of(self, column: str, scale: int, remedy: str) -> int | None:
        """A number ≥ 0 times `scale`, rounded; None where there is none."""
        text = self.text(column)
        if text is None:
            return None
        try:
            value = float(text) * scale
        except ValueError:
            raise self.wrong(column, remedy) from None
        if not 0 <= value < MAX_NS:
            raise self.wrong(column, remedy)
        return round(value)

    def seconds_ns(self, column: str) -> int | None:
        """Seconds ≥ 0 as nanoseconds; None where there are none."""
        return self.number_of(column, NS_PER_S, "give seconds, from 0 to 9.2e9 (292 years)")

    def gpus_milli(self, column: str) -> int | None:
        """A GPU count ≥ 0 in thousandths; None where there is none."""
        return self.number_of(column, 1000, "give a count of GPUs, at least 0")

    def instant_ns(self, column: str) -> int | None:
        """A date and time (UTC unless it names its offset) as nanoseconds after 1970; None where there is none."""
        text = self.text(column)
        if text is None:
            return None
        found = _INSTANT.fullmatch(text)
        try:
            if found is None:
                raise ValueError(text)
            day, clock, fraction, offset = found.groups()
            at = datetime.fromisoformat(f"{day}T{clock}{offset or '+00:00'}")
            found_ns = (at - EPOCH) // timedelta(seconds=1) * NS_PER_S + int((fraction or "").ljust(9, "0"))
            if not 0 <= found_ns <= MAX_NS:
                raise ValueError(text)
        except ValueError:
            raise self.wrong(column, "give a date and time from 1970 to 2261, such as 2017-10-09 07:01:55") from None
        return found_ns

    def submitted(self, found: int | None, column: str) -> int:
        """A time that must be there."""
        if found is None:
            raise self.wrong(column, "give the time of submission")
        return found


def open_text(path: Path) -> TextIO:
    """A UTF-8 text file, gzipped or not.

    Raises:
        InputError: no such file, or a directory.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a directory: give the name of a trace file")
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def head_line(path: Path) -> str:
    """The first line, shortened; empty for a file that is no text."""
    try:
        with open_text(path) as file:
            return file.readline(100_000).strip()
    except UNREADABLE:
        return ""


def csv_rows(path: Path, needed: Sequence[str], header: Sequence[str] = ()) -> Iterator[tuple[str, int, list[str]]]:
    """(place, number, fields) of a CSV, its header first as row 0 (`header` where the file has none).

    Raises:
        InputError: not readable, or a needed column is missing.
    """
    with open_text(path) as file:
        reader = csv.reader(file, strict=True)
        names = list(header) or next(reader, [])
        for column in needed:
            if column not in names:
                raise InputError(f"{path}: column {column} is missing; it has {', '.join(names) or 'none'}: add it")
        yield f"{path}: line 1", 0, names
        try:
            for number, fields in enumerate(reader, start=1):
                if fields:
                    yield f"{path}: line {reader.line_num}", number, fields
        except UNREADABLE as error:
            raise InputError(f"{path}: line {reader.line_num + 1}: cannot be read as CSV: {error}") from error


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """One sentence for what a damaged file raises.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        yield
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def named(place: str, number: int, names: Sequence[str], fields: Sequence[str]) -> Row:
    """A row of a CSV.

    Raises:
        InputError: more or fewer fields than the header.
    """
    if len(fields) != len(names):
        last = names[min(len(fields), len(names)) - 1]
        raise InputError(
            f"{place}: has {len(fields)} fields (up to column {last}) where the header has {len(names)}: "
            "give every column one field"
        )
    return Row(place, number, dict(zip(names, fields, strict=True)))
