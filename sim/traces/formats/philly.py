"""Microsoft Philly's cluster_job_log (Jeon et al., ATC'19): one JSON array of jobs with their scheduling attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from muxtune.sim.traces.formats.base import Reading, SourceFormat
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import UNREADABLE, Row, open_text
from muxtune.spec.errors import InputError

CHUNK_CHARACTERS = 1 << 20
SPACE = " \t\r\n,"


class Philly(SourceFormat):
    """One object a job; the file is read piece by piece. Jobs without an attempt that ended are left out."""

    SUFFIX = ".json"
    NOTE = (
        "duration is the sum of the attempts that started and ended, GPUs are those of the largest attempt, "
        "vc (a virtual cluster) is the tenant; failed and killed jobs count with the time that they ran"
    )
    EXAMPLE = """[
 {"status": "Pass", "vc": "blue", "jobid": "application_1", "user": "u", "submitted_time": "2020-01-01 00:00:30",
  "attempts": [{"start_time": "2020-01-01 00:01:00", "end_time": "2020-01-01 00:02:00",
                "detail": [{"ip": "m1", "gpus": ["gpu0", "gpu1"]}, {"ip": "m2", "gpus": ["gpu0"]}]},
               {"start_time": "2020-01-01 00:03:00", "end_time": "2020-01-01 00:03:30", "detail": []}]},
 {"status": "Killed", "vc": "red", "jobid": "application_2", "user": "u", "submitted_time": "2020-01-01 00:00:00",
  "attempts": [{"start_time": "2020-01-01 00:01:00", "end_time": "2020-01-01 00:01:01",
                "detail": [{"ip": "m1", "gpus": ["gpu0"]}]}]},
 {"status": "Failed", "vc": "red", "jobid": "application_3", "user": "u", "submitted_time": "2020-01-01 00:00:10",
  "attempts": []},
 {"status": "Pass", "vc": "red", "jobid": "application_4", "user": "u", "submitted_time": "2020-01-01 00:05:00",
  "attempts": [{"start_time": "2020-01-01 00:05:00", "end_time": "2020-01-01 01:05:00",
                "detail": [{"ip": "m1", "gpus": ["gpu0"]}]}]}
]
"""
    SPOILT = (
        '[\n{"vc": "blue", "jobid": "a", "submitted_time": "2020-01-01 00:00:30", "attempts": []},\n'
        '{"vc": "blue", "jobid": "b", "submitted_time": "half past", "attempts": []}\n]\n',
        "line 3",
        "submitted_time",
    )

    def matches(self, path: Path) -> bool:
        """Whether it is an array of objects that have attempts."""
        try:
            with open_text(path) as file:
                start = file.read(100_000).lstrip()
        except UNREADABLE:
            return False
        return start.startswith("[") and '"jobid"' in start and '"attempts"' in start

    def gives(self, path: Path) -> frozenset[str]:
        """Everything that the source tells of a job."""
        return frozenset({"tenant", "duration_ns", "gpus_milli"})

    def readings(self, path: Path) -> Iterator[Reading]:
        """One Reading an object."""
        with open_text(path) as file:
            for number, (line, value) in enumerate(_objects(file, str(path))):
                place = f"{path}: line {line}"
                yield Reading(place, partial(_row, place, number, value), self.record)

    def record(self, row: Row) -> Record | str:
        """The job of an object, or why it is none."""
        submit_ns = row.submitted(row.instant_ns("submitted_time"), "submitted_time")
        attempts = row.values.get("attempts") or []
        if not isinstance(attempts, list) or not all(isinstance(a, dict) for a in attempts):
            raise row.wrong("attempts", "give a list of objects with start_time, end_time and detail")
        times = [_ran_ns(Row(f"{row.place}: attempts.{i}", i, a)) for i, a in enumerate(attempts)]
        gpus = max((_gpus(row, a) for a in attempts), default=0)
        ended = [t for t in times if t is not None]
        if not ended:
            return "no attempt ended"
        if not gpus:
            return "asks for no GPU"
        return Record(
            job_id=row.name("jobid"),
            submit_ns=submit_ns,
            duration_ns=sum(ended),
            gpus_milli=1000 * gpus,
            tenant=row.name("vc"),
        )


def _ran_ns(attempt: Row) -> int | None:
    start_ns, end_ns = attempt.instant_ns("start_time"), attempt.instant_ns("end_time")
    if start_ns is None or end_ns is None:
        return None
    if end_ns < start_ns:
        raise attempt.wrong("end_time", "give a time that is not before start_time")
    return end_ns - start_ns


def _gpus(row: Row, attempt: dict[str, Any]) -> int:
    try:
        return sum(len(machine["gpus"]) for machine in attempt.get("detail") or ())
    except (TypeError, KeyError):
        raise row.wrong("attempts", "give each machine of an attempt's detail its list of gpus") from None


def _row(place: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{place}: is no JSON object: give one object a job")
    return Row(place, number, value)


def _objects(file: TextIO, place: str) -> Iterator[tuple[int, Any]]:
    """(line where it starts, value) of every element of a JSON array, holding one piece of the file at a time."""
    decoder = json.JSONDecoder()
    text, at = _opened(file, place)
    line = 1 + text.count("\n", 0, at)
    while True:
        start = _skip(text, at)
        line += text.count("\n", at, start)
        at = start
        if text.startswith("]", at):
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            piece = file.read(CHUNK_CHARACTERS)
            if not piece:
                where = line + text.count("\n", at, error.pos)
                raise InputError(f"{place}: line {where}: malformed JSON: {error.msg}") from error
            text, at = text[at:] + piece, 0
            continue
        yield line, value
        line += text.count("\n", at, end)
        at = end


def _opened(file: TextIO, place: str) -> tuple[str, int]:
    """The first piece, and the place after its bracket."""
    text = file.read(CHUNK_CHARACTERS)
    at = _skip(text, 0)
    if not text.startswith("[", at):
        raise InputError(f"{place}: is no JSON array of jobs: give the cluster_job_log as it was published")
    return text, at + 1


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at
