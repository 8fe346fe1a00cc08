"""Records in order of submission without holding them all: sorted runs on disk, merged."""

from __future__ import annotations

import heapq
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from operator import attrgetter
from typing import IO

from muxtune.sim.traces.record import Record

#: Records held at once; a record takes about 300 bytes.
RUN_RECORDS = 100_000
#: Records written and read back at once.
BLOCK_RECORDS = 500

_SUBMITTED = attrgetter("submit_ns")


def by_submission(records: Iterable[Record], run_records: int = RUN_RECORDS) -> Iterator[Record]:
    """The records by submission; those of one moment keep their order."""
    with ExitStack() as files:
        runs: list[IO[bytes]] = []
        held: list[Record] = []
        for record in records:
            held.append(record)
            if len(held) == run_records:
                runs.append(files.enter_context(tempfile.TemporaryFile()))
                _spill(sorted(held, key=_SUBMITTED), runs[-1])
                held = []
        held.sort(key=_SUBMITTED)
        yield from heapq.merge(*map(_read, runs), held, key=_SUBMITTED) if runs else held


def _spill(records: list[Record], file: IO[bytes]) -> None:
    for start in range(0, len(records), BLOCK_RECORDS):
        block = records[start : start + BLOCK_RECORDS]
        pickle.dump([(r.job_id, r.submit_ns, r.duration_ns, r.gpus_milli, r.tenant) for r in block], file)
    file.seek(0)


def _read(file: IO[bytes]) -> Iterator[Record]:
    while True:
        try:
            block = pickle.load(file)
        except EOFError:
            return
        for job_id, submit_ns, duration_ns, gpus_milli, tenant in block:
            yield Record(
                job_id=job_id, submit_ns=submit_ns, duration_ns=duration_ns, gpus_milli=gpus_milli, tenant=tenant
            )
