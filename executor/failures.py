"""What is said when a worker fails: how it ended, the last lines of its log that matter, and where the whole log was kept."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from pathlib import Path

from muxtune.spec.errors import InputError
from muxtune.spec.files import write_text

#: Lines that say nothing about a death: warnings, their source lines, and the frames of a traceback.
NOISE = re.compile(r"Warning|warnings\.warn|^\s|^\[W|^Traceback|^$")
TAIL_LINES = 3


def exit_text(code: int | None) -> str:
    """`exit code 3`, `killed by SIGKILL`, or that the process still runs."""
    if code is None:
        return "its connection broke, the process still runs"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def log_tail(log: str) -> str:
    """The last lines of a log that are neither warnings nor frames of a traceback, on one line."""
    kept = [line.strip() for line in log.splitlines() if not NOISE.search(line)]
    return " | ".join(kept[-TAIL_LINES:]) or "its log says nothing"


def keep_log(text: str) -> str:
    """Keep a whole log where the user finds it; ` (log: PATH)`, or nothing where it cannot be written."""
    path = Path(tempfile.gettempdir()) / f"muxtune-{os.getpid()}.log"
    try:
        write_text(path, text)
    except InputError:
        return ""
    return f" (log: {path})"
