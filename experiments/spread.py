"""Runs cells here, in a process pool or on Ray, keeps each result in a folder, and takes up what a killed run left."""

from __future__ import annotations

import csv
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from muxtune.experiments.commands.inputs import Progress, output_folder, silent
from muxtune.experiments.console import json_text
from muxtune.experiments.replay_cell import Cell
from muxtune.experiments.replay_run import Shelves, run_cell
from muxtune.sim.cluster.tally import ROW_COLUMNS, Told
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_text

Engine = Literal["pool", "ray"]


@dataclass(frozen=True, slots=True)
class Files:
    """Where a running cell writes a line a job, and what it has so far; None: nowhere."""

    rows: Path | None = None
    partial: Path | None = None


#: A cell, its place in the list, and where it writes.
Work = tuple[int, Cell, Files]
#: Seconds between two partial results of a replay that runs.
PARTIAL_SECONDS = 10.0


class Interrupt:
    """While it is open, the first Ctrl-C only sets `asked`, so that what runs can end in order; a second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> Interrupt:
        try:
            self._before = signal.signal(signal.SIGINT, self._set)
        except ValueError:  # not the main thread: whoever owns it decides
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Keeper:
    """Results of cells in DIR/cells, one file each; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, resume: bool, job_rows: bool = False) -> None:
        self.folder = None if folder is None else output_folder(folder / "cells")
        self.resume = resume
        self.job_rows = job_rows

    def files(self, cell: Cell) -> Files:
        """Where a cell writes while it runs."""
        if self.folder is None:
            return Files()
        rows = self.folder / f"{cell.key}.jobs.csv" if self.job_rows else None
        return Files(rows=rows, partial=self.folder / f"{cell.key}.partial.json")

    def found(self, cell: Cell) -> dict[str, Any] | None:
        """A result that an earlier run finished.

        Raises:
            InputError: its file is damaged.
        """
        if self.folder is None or not self.resume:
            return None
        path = self.folder / f"{cell.key}.json"
        if not path.is_file():
            return None
        try:
            body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: is no result: {error}: delete it, the cell is then run again") from error
        return body

    def keep(self, cell: Cell, body: dict[str, Any]) -> None:
        """Keep a result; one that is not complete under another name, so that it is not taken for one."""
        if self.folder is None:
            return
        partial = self.folder / f"{cell.key}.partial.json"
        if body["complete"]:
            _replace(self.folder / f"{cell.key}.json", json_text(body))
            partial.unlink(missing_ok=True)
        else:
            _replace(partial, json_text(body))


def _replace(path: Path, text: str) -> None:
    """Write a file in one step: whoever reads it sees the old one or the new one, whole."""
    beside = path.with_suffix(".tmp")
    write_text(beside, text)
    beside.replace(path)


def run_cells(
    cells: Sequence[Cell],
    *,
    engine: Engine = "pool",
    jobs: int = 1,
    keeper: Keeper,
    progress: Progress = silent,
    done: Callable[[Sequence[dict[str, Any]]], None] = lambda bodies: None,
) -> list[dict[str, Any]]:
    """The results in the order of the cells; after Ctrl-C those there are, the last of them partial.

    `done` is told all results so far whenever there is one more, a partial one included.

    Raises:
        InputError: a wrong cell, or an engine that is not there.
    """
    results: dict[int, dict[str, Any]] = {}
    for place, cell in enumerate(cells):
        body = keeper.found(cell)
        if body is not None:
            results[place] = body
    left = [(place, cell) for place, cell in enumerate(cells) if place not in results]

    def got(place: int, body: dict[str, Any]) -> None:
        results[place] = body
        keeper.keep(cells[place], body)
        done([results[p] for p in sorted(results)])

    with Interrupt() as stop:
        work = [(place, cell, keeper.files(cell)) for place, cell in left]
        runs = _here(work, stop, got) if jobs == 1 and engine == "pool" else _apart(work, engine, jobs, stop)
        progress("replay", len(results), len(cells))
        for place, body in runs:
            got(place, body)
            progress("replay", sum(b["complete"] for b in results.values()), len(cells))
            if stop.asked and jobs == 1:
                break
    return [results[place] for place in sorted(results)]


def _here(
    left: Sequence[Work], stop: Interrupt, got: Callable[[int, dict[str, Any]], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """One after the other in this process, which shares predictions; partial results on the way."""
    shelves: Shelves = {}
    for place, cell, files in left:
        said_s = time.monotonic()

        def report(body: Callable[[], dict[str, Any]], place: int = place) -> None:
            nonlocal said_s
            if time.monotonic() - said_s >= PARTIAL_SECONDS:
                got(place, body())
                said_s = time.monotonic()

        with _job_rows(files.rows) as told:
            body = run_cell(cell, stop, report, told, shelves)
        yield place, body


def _apart(left: Sequence[Work], engine: Engine, jobs: int, stop: Interrupt) -> Iterator[tuple[int, dict[str, Any]]]:
    if engine == "ray":
        from muxtune.experiments.on_ray import on_ray

        yield from on_ray(left, jobs, stop)
        return
    # Spawned, not forked: a bar's thread may hold a lock while this process is copied.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(in_worker, cell, files): place for place, cell, files in left}
        for future in as_completed(futures):
            if stop.asked:
                pool.shutdown(wait=False, cancel_futures=True)
            if not future.cancelled():
                yield futures[future], future.result()


#: Predictions that a worker keeps from cell to cell.
_SHELVES: Shelves = {}


def in_worker(cell: Cell, files: Files) -> dict[str, Any]:
    """One cell in a process of its own, which writes what it has so far now and then.

    Ctrl-C, which every process of the terminal gets, ends it with a partial result.
    """
    said_s = time.monotonic()

    def report(body: Callable[[], dict[str, Any]]) -> None:
        nonlocal said_s
        if files.partial is not None and files.partial.parent.is_dir() and time.monotonic() - said_s >= PARTIAL_SECONDS:
            _replace(files.partial, json_text(body()))
            said_s = time.monotonic()

    with Interrupt() as stop, _job_rows(files.rows) as told:
        return run_cell(cell, stop, report, told, _SHELVES)


@contextmanager
def _job_rows(path: Path | None) -> Iterator[Told | None]:
    """Writes a line a job as it leaves; None without a path."""
    if path is None:
        yield None
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROW_COLUMNS)
        writer.writeheader()
        yield writer.writerow
