"""`muxtune validate`: a fixed suite of plans, predicted against measured."""

from __future__ import annotations

from pathlib import Path

from muxtune.experiments.commands.study import run_and_write
from muxtune.experiments.suites import suite_study


def run(suite: str, out: Path, rounds: int, seed: int, as_json: bool) -> str:
    """Run a suite, write its report and results into `out`, and return what to print."""
    return run_and_write(suite_study(suite, rounds, seed), out, as_json)
