"""Memory of a Program for the command line: each rank's peak, its moment, and what is in use then by kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxtune.experiments.console import table
from muxtune.spec.memory import moment_text, rank_peaks
from muxtune.spec.noun import plain
from muxtune.spec.program import Bound
from muxtune.spec.timeline import Timeline
from muxtune.spec.units import format_bytes, format_ns


def memory_rows(bound: Bound, timeline: Timeline | None = None) -> list[dict[str, Any]]:
    """One row a rank; with a predicted timeline also when the peak is first reached."""
    rows: list[dict[str, Any]] = []
    for peak in rank_peaks(bound):
        row: dict[str, Any] = {"rank": peak.rank, "peak_bytes": peak.peak_bytes, "static_bytes": peak.static_bytes}
        row["moment"] = moment_text(bound, peak)
        if timeline:
            mine = [s for s in timeline.memory if s.rank == peak.rank]
            highest = max(mine, key=lambda s: s.in_use_bytes)
            row["time_ns"] = highest.time_ns
            if peak.lists > 1:  # the peak is a bound that the timeline need not reach
                row["simulated_peak_bytes"] = highest.in_use_bytes
        rows.append({**row, "footprint": plain(peak.footprint)})
    return rows


def memory_table(rows: Sequence[dict[str, Any]], limit_bytes: int) -> Any:
    """Peaks against the device's memory; kinds that no rank uses are left out."""
    kinds = [k for k in rows[0]["footprint"] if any(r["footprint"][k] for r in rows)]
    names = [k.removesuffix("_bytes").replace("_", " ") for k in kinds]
    cells = []
    for row in rows:
        moment = row["moment"] + (f" at {format_ns(row['time_ns'])}" if "time_ns" in row else "")
        peak = f"{format_bytes(row['peak_bytes'])} ({100 * row['peak_bytes'] / limit_bytes:.1f} %)"
        cells.append([str(row["rank"]), peak, moment, *(format_bytes(row["footprint"][k]) for k in kinds)])
    return table(["rank", "peak memory", "reached", *names], cells)
