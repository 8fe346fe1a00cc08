"""report.html of a study: one self-contained page of tables and SVG, valid for partial results too."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from muxtune.experiments.plots import study as plots
from muxtune.experiments.result import Pair, PlanRow, Ranking, Shrunk, StudyResult
from muxtune.spec.files import write_text
from muxtune.spec.units import format_bytes, format_ns

TEMPLATE = Path(__file__).parent / "data" / "report.html"
BASELINES = ("hf-peft", "sl-peft")
#: Acceptance targets of predicted against measured time (DESIGN §13); noise comes on top.
CPU_TARGET, GPU_TARGET = 0.12, 0.10

#: Columns of the policy table; a pair of names stands under one heading.
COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("policy", ()),
    ("iteration", ("predicted", "measured")),
    ("error", ()),
    ("noise", ()),
    ("model error", ()),
    ("measured tokens/s", ("billed", "processed")),
    ("peak memory", ("predicted", "measured")),
    ("bubble", ("predicted", "measured")),
    ("planning", ()),
)
UNVALIDATED = (
    "Not validated here: collectives hidden under compute (on a CPU they take turns), several GPUs, NVLink and InfiniBand. "
    "What the simulator says of them is simulated, unvalidated.",
    "Not validated here: energy, which is estimated from data sheet watts.",
)
ONLY_CPU = "Not validated here: any GPU. Its kernels, launch costs and memory differ; only this CPU was measured."
NOTHING = "<p class='note'>Nothing measured yet.</p>"


def write_report(result: StudyResult, pairs: Sequence[Pair], path: Path) -> None:
    """Write the page; all texts are escaped, nothing is loaded from elsewhere."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    target = _target(result)
    winners = {(r.workload, r.layout): r.winner for r in result.rankings}
    write_text(
        path,
        template.substitute(
            title="muxtune: predicted against measured",
            subtitle=_subtitle(result),
            partial="" if result.complete else PARTIAL,
            headline=escape(headline(result)),
            cards=_cards(result, target),
            rankings="".join(f"<li>{escape(_ranking(r, _group(result, r)))}</li>" for r in result.rankings),
            target=f"{target:.0%}",
            tables="".join(_table(r, _group(result, r), target) for r in result.rankings) or NOTHING,
            scatter=_figure(
                plots.scatter(result.rows), "Grey band: ±10 %. Bars: error propagated from the cost model."
            ),
            pipelines="".join(_pipeline(p, winners) for p in pairs) or NOTHING,
            worst=_worst(result),
            causes=_figure(plots.causes(result.rows), CAUSES, narrow=True),
            operators=_figure(plots.operators(result.rows), OPERATORS, narrow=True),
            families=_figure(plots.families(result.families), FAMILIES, narrow=True),
            memory=_figure(plots.memory(result.rows), "", narrow=True),
            validity="".join(f"<li>{escape(text)}</li>" for text in _validity(result)),
            provenance=_provenance(result),
        ),
    )


PARTIAL = "<p class='partial'>Partial result: the study was cut off or still runs. What is shown is valid.</p>"
CAUSES = (
    "Device time of all plans and ranks. Beside the bars: predicted minus measured, as a share of all measured time. "
    "Idle is what is left of the makespan."
)
OPERATORS = "Subgraphs of all plans and ranks by kind and direction. Beside the bars: predicted / measured − 1."
FAMILIES = "Interior points of each operator's curve, predicted by a fit without them; n counts measured points."


def headline(result: StudyResult) -> str:
    """Who was fastest how often, and by how much against the published baselines."""
    if not result.rankings:
        return "No plan was measured yet."
    wins = [r.winner for r in result.rankings]
    best = max(dict.fromkeys(wins), key=wins.count)
    text = f"{best} was the fastest policy in {wins.count(best)} of {len(wins)} comparisons"
    gains = []
    for baseline in BASELINES:
        found = [g for r in result.rankings if r.winner == best for name, g in r.speedup_over if name == baseline]
        if found and best != baseline:
            gains.append(f"{_range(found)} over {baseline}")
    agreed = sum(r.winner == r.predicted_winner for r in result.rankings)
    return (
        f"{text}{': ' if gains else ''}{', '.join(gains)}. The simulator named the winner in {agreed} of {len(wins)}."
    )


def _range(gains: Sequence[float]) -> str:
    low, high = f"{min(gains):.2f}", f"{max(gains):.2f}"
    return f"{low}×" if low == high else f"{low}–{high}×"


def _target(result: StudyResult) -> float:
    return CPU_TARGET if result.device == "cpu" else GPU_TARGET


def _group(result: StudyResult, ranking: Ranking) -> list[PlanRow]:
    mine = (r for r in result.rows if (r.workload, r.layout) == (ranking.workload, ranking.layout))
    return sorted(mine, key=lambda r: (r.measured_ns, r.policy))


def _subtitle(result: StudyResult) -> str:
    born = result.provenance
    plans = f"{len(result.rows)} plans, {len(result.rankings)} comparisons"
    return escape(f"{born.device} ({result.device}), {born.cores} cores · {plans} · {result.seconds / 60:.1f} min")


def _cards(result: StudyResult, target: float) -> str:
    taus = [r.kendall_tau for r in result.rankings if r.kendall_tau is not None]
    resolved = [r.resolved_tau for r in result.rankings if r.resolved_tau is not None]
    inside = sum(not _off(r, target) for r in result.rows)
    worst = result.worst
    cards = [
        (_percent(result.mape), "mean absolute error of predicted time"),
        (_percent(result.noise), "noise floor (median): no prediction can be better"),
        *([(_percent(result.repeatability), "the same plan measured twice (median)")] if result.repeats else []),
        (f"{inside} of {len(result.rows)}", f"plans within {target:.0%} plus noise"),
        (_percent(worst.error if worst else None, "+.1%"), "worst plan"),
        (f"{statistics.fmean(taus):.2f}" if taus else "–", "Kendall τ-b, mean over comparisons"),
        (
            f"{statistics.fmean(resolved):.2f}" if resolved else "–",
            "τ over pairs that differ by more than noise and error",
        ),
    ]
    made = (f"<div class='card'><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in cards)
    return f"<div class='cards'>{''.join(made)}</div>"


def _percent(value: float | None, form: str = ".1%") -> str:
    return "–" if value is None else format(value, form)


def _off(row: PlanRow, target: float) -> bool:
    return abs(row.error) > target + row.noise


def _ranking(ranking: Ranking, rows: Sequence[PlanRow]) -> str:
    """One comparison in a sentence; a lead that noise could explain is said to be one."""
    gains = ", ".join(f"{gain:.2f}× over {name}" for name, gain in ranking.speedup_over if name != ranking.winner)
    text = f"{ranking.workload}, {ranking.layout}: {ranking.winner} is fastest{' (' + gains + ')' if gains else ''}"
    if len(rows) > 1:
        lead = rows[1].measured_ns / rows[0].measured_ns - 1
        if lead <= max(rows[0].noise, rows[1].noise):
            text += f"; its lead over {rows[1].policy} ({lead:.1%}) is within the noise"
    if ranking.predicted_winner != ranking.winner:
        text += f"; predicted was {ranking.predicted_winner}"
    tau = "–" if ranking.kendall_tau is None else f"{ranking.kendall_tau:.2f}"
    return f"{text}. Kendall τ-b {tau}; {ranking.unresolved:.0%} of the pairs are closer than noise and error."


def _table(ranking: Ranking, rows: Sequence[PlanRow], target: float) -> str:
    body = "".join(_table_row(row, row.policy == ranking.winner, target) for row in rows)
    title = escape(f"{ranking.workload}, {ranking.layout}")
    return f"<h3>{title}</h3><div class='wide'><table>{_table_head()}<tbody>{body}</tbody></table></div>"


def _table_head() -> str:
    upper = "".join(
        f"<th colspan='{len(below)}' class='pair'>{name}</th>" if below else f"<th rowspan='2'>{name}</th>"
        for name, below in COLUMNS
    )
    lower = "".join(f"<th>{name}</th>" for _, below in COLUMNS for name in below)
    return f"<thead><tr>{upper}</tr><tr>{lower}</tr></thead>"


def _table_row(row: PlanRow, winner: bool, target: float) -> str:
    cells = (
        format_ns(row.predicted_ns),
        format_ns(row.measured_ns),
        f"{row.error:+.1%}",
        f"{row.noise:.1%}",
        f"±{row.relative_error:.1%}"
        + (f", {row.extrapolated_fraction:.0%} extrapolated" if row.extrapolated_fraction else ""),
        f"{row.billed_tokens_per_s:,.0f}",
        f"{row.processed_tokens_per_s:,.0f}",
        _peak(row.predicted_peak_bytes),
        _peak(row.measured_peak_bytes),
        f"{row.predicted_bubble:.1%}",
        f"{row.measured_bubble:.1%}",
        f"{row.plan_seconds:.2f} s",
    )
    marked = (
        f"<td{' class=off' if i == 2 and _off(row, target) else ''}>{escape(c)}</td>" for i, c in enumerate(cells)
    )
    return (
        f"<tr{' class=winner' if winner else ''}><td class='text name'>{escape(row.policy)}</td>{''.join(marked)}</tr>"
    )


def _peak(peak_bytes: Iterable[int]) -> str:
    peak = max(peak_bytes, default=0)
    return format_bytes(peak) if peak else "–"


def _figure(svg: str, caption: str, narrow: bool = False) -> str:
    if not svg:
        return NOTHING
    return f"<figure{' class=narrow' if narrow else ''}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _pipeline(pair: Pair, winners: dict[tuple[str, str], str]) -> str:
    """A plan's picture, open where the plan won."""
    won = winners.get((pair.workload, pair.layout)) == pair.policy
    title = escape(f"{pair.workload}, {pair.layout}: {pair.policy}") + (" (fastest)" if won else "")
    return f"<details{' open' if won else ''}><summary>{title}</summary>{_figure(plots.pipeline(pair), '')}</details>"


def _worst(result: StudyResult) -> str:
    worst = result.worst
    if worst is None:
        return NOTHING
    off = sorted(worst.causes, key=lambda c: -abs(c.predicted_ns - c.measured_ns))[:2]
    shares = ", ".join(
        f"{c.cause} {'+' if c.predicted_ns >= c.measured_ns else '−'}{format_ns(abs(c.predicted_ns - c.measured_ns))}"
        for c in off
    )
    text = (
        f"Worst plan: {worst.policy} on {worst.workload}, {worst.layout}: predicted {format_ns(worst.predicted_ns)}, "
        f"measured {format_ns(worst.measured_ns)} ({worst.error:+.1%}, noise {worst.noise:.1%})."
    )
    said = f"<p>{escape(text + (f' Largest differences of device time: {shares}.' if shares else ''))}</p>"
    return said + (f"<p>{escape(_shrunk(result.shrunk))}</p>" if result.shrunk else "")


def _shrunk(found: Shrunk) -> str:
    """What the worst plan was cut down to, and where its error lies then."""
    samples = ", ".join(f"{task}: {count}" for task, count in found.samples)
    off = sorted(found.operators, key=lambda o: -abs(o.predicted_ns - o.measured_ns))[:2]
    most = ", ".join(f"{o.cause} {format_ns(o.predicted_ns)} for {format_ns(o.measured_ns)}" for o in off)
    return (
        f"The smallest Program that still shows it (worst.json; {found.kept} of {found.steps} cuts kept it) has the samples "
        f"{samples}: predicted {format_ns(found.predicted_ns)}, measured {format_ns(found.measured_ns)} "
        f"({found.error:+.1%}, noise {found.noise:.1%}). Furthest off there: {most}."
    )


def _validity(result: StudyResult) -> list[str]:
    told = [f"Fitted on: {result.fitted_on}.", f"Held out: {result.held_out}."]
    return [*told, *([ONLY_CPU] if result.device == "cpu" else []), *UNVALIDATED]


def _provenance(result: StudyResult) -> str:
    born = result.provenance
    entries = {
        "device": f"{born.device} ({born.host}, {born.cores} cores)",
        "system": born.driver,
        "libraries": ", ".join(born.libraries),
        "revision": born.revision,
        "command": born.command,
        "rounds": ", ".join(str(n) for n in sorted({r.rounds for r in result.rows})) or "–",
        "reference GEMM": format_ns(result.reference_ns),
        "stolen by the hypervisor": f"{born.steal_percent:.1f} %",
        "study took": f"{result.seconds:.0f} s",
    }
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
