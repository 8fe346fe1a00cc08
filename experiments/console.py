"""What commands say: tables or one JSON object for standard output, progress on standard error."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

#: Columns where standard output is no terminal: nothing is wrapped, so that lines can be searched.
UNWRAPPED_COLUMNS = 10_000
#: Seconds between two progress lines where standard error is no terminal.
QUIET_SECONDS = 15.0

_NUMBER = re.compile(r"[-+±]?[0-9][0-9.,]*( ?[^\s]{1,4})?\*?|-|")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table of texts; columns of numbers are aligned to the right."""
    made = Table(title=title or None, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for place, name in enumerate(columns):
        numeric = all(_NUMBER.fullmatch(row[place]) for row in rows)
        made.add_column(name, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def render(*parts: Table | str) -> str:
    """Tables and lines as text for standard output; text is never read as markup."""
    width = None if sys.stdout.isatty() else UNWRAPPED_COLUMNS
    console = Console(markup=False, emoji=False, highlight=False, width=width)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def json_text(body: dict[str, Any]) -> str:
    """One JSON object; a number that JSON does not have (NaN, infinity) becomes null."""
    return json.dumps(_finite(body), indent=1, allow_nan=False) + "\n"


def json_line(body: dict[str, Any]) -> str:
    """The same on one line, for files that grow line by line."""
    return json.dumps(_finite(body), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Progress:
    """Called with (label, done, total): a bar on a terminal, else a line now and then. A context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True, markup=False, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._said_s = -math.inf
        self._label = ""

    def __call__(self, label: str, done: int, total: int) -> None:
        """Say how far the step `label` is."""
        if self._bars is not None:
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total)
            self._bars.update(self._tasks[label], completed=done, total=total)
            return
        now_s = time.monotonic()
        if label != self._label or done >= total or now_s - self._said_s >= QUIET_SECONDS:
            self._label, self._said_s = label, now_s
            note(f"{label}: {done}/{total}")

    def say(self, text: str) -> None:
        """One line on standard error, above the bars."""
        if self._bars is not None:
            self._bars.console.print(text, soft_wrap=True)
        else:
            note(text)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
