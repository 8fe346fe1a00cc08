"""`muxtune demo`: the whole loop on this CPU: profile, fit, plan, simulate, execute, compare, report."""

from __future__ import annotations

from pathlib import Path

from muxtune.experiments.commands.study import run_and_write
from muxtune.experiments.suites import demo_study


def run(out: Path, rounds: int, seed: int, as_json: bool) -> str:
    """Run the demo, write report.html, trace.json, plan.json and result.json into `out`, and return what to print."""
    return run_and_write(demo_study(rounds, seed), out, as_json)
