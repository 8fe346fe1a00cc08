"""What `demo` and `validate` share: run a study, keep its files valid while it runs, and show its tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from muxtune.experiments.commands.report import RESULT, write_pairs
from muxtune.experiments.console import Progress, json_text, note, render, table
from muxtune.experiments.plots import study as plots
from muxtune.experiments.report import write_report
from muxtune.experiments.result import Pair, PlanRow, Ranking, StudyResult
from muxtune.experiments.study import Study, StudyConfig
from muxtune.spec.chrome import chrome_trace
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_text
from muxtune.spec.units import format_bytes, format_ns

#: Plans whose timelines go into trace.json: one workload is enough to look at.
TRACED_POLICIES = ("hf-peft", "muxtune")
COLUMNS = (
    "workload",
    "layout",
    "policy",
    "predicted",
    "measured",
    "error",
    "noise",
    "billed tok/s",
    "processed tok/s",
    "peak pred",
    "peak meas",
    "bubble",
)


def run_and_write(config: StudyConfig, out: Path, as_json: bool) -> str:
    """Run a study into `out`; every finished layout leaves a valid report, trace and result there."""
    if config.rounds < 2 or config.profile_rounds < 2:
        raise InputError(f"rounds={config.rounds}: the noise needs at least 2 rounds; 20 resolve 10 %")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    _clear_finished(out)
    with Progress() as progress:
        result, _ = Study(config, out, progress).run(lambda r, pairs: write_study(r, pairs, out))
    note(f"report: {out / 'report.html'}   trace: {out / 'trace.json'} (open in ui.perfetto.dev)")
    return json_text(result.as_json()) if as_json else study_tables(result)


def _clear_finished(out: Path) -> None:
    """A cut-off study goes on with the operator rounds that are there; after a finished one they are measured anew."""
    if (out / RESULT).is_file() and '"complete": true' in (out / RESULT).read_text(encoding="utf-8"):
        shutil.rmtree(out / "profile", ignore_errors=True)


def write_study(result: StudyResult, pairs: Sequence[Pair], out: Path) -> None:
    """report.html, scatter.svg, trace.json and result.json, each whole or not at all."""
    write_text(out / "result.json", json_text(result.as_json()))
    write_pairs(pairs, out)
    write_report(result, pairs, out / "report.html")
    write_text(out / "scatter.svg", plots.scatter(result.rows))
    traced = [p for p in pairs if p.policy in TRACED_POLICIES and p.workload == pairs[-1].workload]
    named = [
        (f"{side} {p.layout} {p.policy}", timeline)
        for p in traced
        for side, timeline in (("predicted", p.predicted_at_speed), ("measured", p.measured))
    ]
    write_text(out / "trace.json", json.dumps(chrome_trace(named)))


def study_tables(result: StudyResult) -> str:
    """The policy table, the rankings and the headline for a terminal."""
    rows = [_row(r) for r in sorted(result.rows, key=lambda r: (r.workload, r.layout, r.measured_ns))]
    parts = [render(table(COLUMNS, rows)), *(headline(r) + "\n" for r in result.rankings)]
    if result.mape is not None and result.worst is not None and result.noise is not None:
        worst = result.worst
        parts.append(
            f"mean absolute error {result.mape:.1%} (noise floor {result.noise:.1%}{_twice(result)}), worst {worst.error:+.1%} "
            f"for {worst.policy} on {worst.workload}, {worst.layout}; held out: {result.held_out}\n"
        )
    return "".join(parts)


def _twice(result: StudyResult) -> str:
    return "" if result.repeatability is None else f", the same plan twice {result.repeatability:.1%}"


def _row(row: PlanRow) -> tuple[str, ...]:
    return (
        row.workload,
        row.layout,
        row.policy,
        format_ns(row.predicted_ns),
        format_ns(row.measured_ns),
        f"{row.error:+.1%}",
        f"{row.noise:.1%}",
        f"{row.billed_tokens_per_s:,.0f}",
        f"{row.processed_tokens_per_s:,.0f}",
        format_bytes(max(row.predicted_peak_bytes)),
        format_bytes(max(row.measured_peak_bytes)),
        f"{row.measured_bubble:.0%}",
    )


def headline(ranking: Ranking) -> str:
    """Who won, by how much, and whether the prediction agreed."""
    gains = ", ".join(f"{gain:.2f}x over {policy}" for policy, gain in ranking.speedup_over)
    agreed = "as predicted" if ranking.predicted_winner == ranking.winner else f"predicted: {ranking.predicted_winner}"
    tau = "-" if ranking.kendall_tau is None else f"{ranking.kendall_tau:.2f}"
    resolved = "-" if ranking.resolved_tau is None else f"{ranking.resolved_tau:.2f}"
    return (
        f"{ranking.workload}, {ranking.layout}: {ranking.winner} won ({agreed}): {gains}; Kendall tau {tau}, "
        f"{resolved} over resolved pairs ({ranking.unresolved:.0%} unresolved)"
    )
