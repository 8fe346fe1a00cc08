"""replay.html: one self-contained page of replays, valid for partial results too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from muxtune.experiments.plots import replay as plots
from muxtune.spec.files import write_text
from muxtune.spec.units import NS_PER_S, format_ns

DATA = Path(__file__).parent / "data"
PARTIAL = "<p class='partial'>Partial result: some replays were cut off or still run. What is shown is valid.</p>"
#: Replays whose tenants are listed.
MOST_TABLES = 6


def write_replay_report(
    bodies: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]], path: Path, *, expected: int
) -> None:
    """Write the page of the replays there are so far, of `expected`; texts are escaped, nothing is loaded from elsewhere."""
    style = re.search(r"<style>(.*?)</style>", (DATA / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    whole = len(bodies) == expected and all(b["complete"] for b in bodies)
    names = sorted({b["trace"] for b in bodies})
    statements = list(dict.fromkeys(s for b in bodies for s in b["statements"]))
    calibrated = all(b["cost_model"]["calibrated"] for b in bodies)
    told = [] if calibrated else ["Iteration times are UNCALIBRATED: data sheet figures, nothing was measured."]
    template = Template((DATA / "replay.html").read_text(encoding="utf-8"))
    write_text(
        path,
        template.substitute(
            title=escape(f"muxtune: replay of {', '.join(names) or 'nothing yet'}"),
            style=style[1],
            subtitle=escape(f"{len(bodies)} of {expected} replays"),
            partial="" if whole else PARTIAL,
            headline=escape(headline(bodies)),
            rows=_table(ROW_HEADS, [_row(b) for b in bodies]),
            means=_means(means),
            bars=_figure(plots.bars(bodies)),
            curves=_figure(plots.curves(bodies)),
            shares=_table(("replay", *SHARES), [_shares(b) for b in bodies]),
            tenants="".join(map(_tenants, bodies[:MOST_TABLES])) or "<p class='note'>None yet.</p>",
            statements="".join(f"<li>{escape(s)}</li>" for s in (*told, *statements)),
        ),
    )


def headline(bodies: Sequence[dict[str, Any]]) -> str:
    """Which replay moved most tokens and which had the least mean JCT."""
    finished = [b for b in bodies if b["completed"]]
    if not finished:
        return "No job has completed yet."
    fast = max(finished, key=lambda b: b["billed_tokens_per_s"])
    short = min(finished, key=lambda b: b["jct_s"]["mean"])
    return (
        f"Most tokens: {plots.label(fast)} with {fast['billed_tokens_per_s']:,.0f} billed tokens/s. Least mean JCT: "
        f"{plots.label(short)} with {_time(short['jct_s']['mean'])}."
    )


ROW_HEADS = (
    *(
        "replay",
        "jobs",
        "completed",
        "rejected",
        "failed",
        "under way",
        "billed tokens/s",
        "JCT mean",
        "p50",
        "p95",
        "p99",
    ),
    *("queue mean", "p95", "slowdown", "ftf", "SLO", "fairness", "MJ", "cost/M tokens", "re-plans", "lost steps"),
)


def _row(body: dict[str, Any]) -> list[str]:
    jct, queue = body["jct_s"], body["queue_s"]
    energy = None if body["energy_j"] is None else body["energy_j"] / 1e6
    return [
        plots.label(body) + ("" if body["complete"] else " (partial)"),
        *(f"{body[n]:,}" for n in ("jobs", "completed", "rejected", "failed")),
        f"{body['running'] + body['waiting']:,}",
        f"{body['billed_tokens_per_s']:,.0f}",
        *(_time(jct[n]) for n in ("mean", "p50", "p95", "p99")),
        _time(queue["mean"]),
        _time(queue["p95"]),
        _number(body["slowdown"]["mean"]),
        _number(body["finish_time_fairness"]["mean"]),
        _number(body["slo_attainment"]),
        _number(body["fairness"]),
        _number(energy),
        _number(body["cost_per_million_billed_tokens"]),
        f"{body['replans']:,}",
        f"{body['lost_steps']:,}",
    ]


SHARES = ("busy", "computing", "lost", "overhead", "idle", "free", "down")


def _shares(body: dict[str, Any]) -> list[str]:
    shares = {**body["gpu_share"], "computing": body["computing"]}
    return [plots.label(body), *(f"{100 * shares[name]:.1f} %" for name in SHARES)]


def _tenants(body: dict[str, Any]) -> str:
    heads = ("tenant", "jobs", "completed", "JCT", "queue", "slowdown", "GPU hours", "billed tokens", "SLO")
    rows = [
        [
            t["tenant"],
            f"{t['jobs']:,}",
            f"{t['completed']:,}",
            _time(t["jct_s"]),
            _time(t["queue_s"]),
            _number(t["slowdown"]),
            f"{t['gpu_hours']:,.1f}",
            f"{t['billed_tokens']:,}",
            _number(t["slo_attainment"]),
        ]
        for t in body["tenants"]
    ]
    more = body["tenants_listed_of"] - len(rows)
    title = plots.label(body) + (f" (and {more} tenants with fewer jobs)" if more else "")
    return f"<h3>{escape(title)}</h3>{_table(heads, rows)}"


def _means(rows: Sequence[dict[str, Any]]) -> str:
    if not any(len(r["seeds"]) > 1 for r in rows):
        return ""
    figures = [(n, t) for n, t in (("billed_tokens_per_s", 1.0), ("jct_s.mean", 3600.0), ("jct_s.p95", 3600.0))]
    heads = ("policy", "cluster policy", "seeds", "billed tokens/s", "mean JCT (h)", "p95 JCT (h)")
    cells = [
        [r["policy"], r["cluster_policy"], str(len(r["seeds"])), *(interval_text(r[n], t) for n, t in figures)]
        for r in rows
    ]
    return f"<h3>Means over seeds, 95 % confidence intervals</h3>{_table(heads, cells)}"


def interval_text(found: dict[str, Any] | None, unit: float = 1.0) -> str:
    """mean ± half width."""
    if found is None:
        return "–"
    half = "" if found["half_width"] is None else f" ± {_number(found['half_width'] / unit)}"
    return f"{_number(found['mean'] / unit)}{half}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "<p class='note'>None yet.</p>"
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr><td class='text name'>{escape(r[0])}</td>{''.join(f'<td>{escape(c)}</td>' for c in r[1:])}</tr>"
        for r in rows
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>" if svg else "<p class='note'>None yet.</p>"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds / 3600:,.2f} h" if seconds >= 3600 else format_ns(seconds * NS_PER_S)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
