"""Rankings of a study: per workload and layout, which policy is fastest by prediction and by measurement."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.experiments.result import PlanRow, Ranking
from muxtune.spec.metrics import kendall_tau_b


def rank(rows: Sequence[PlanRow]) -> list[Ranking]:
    """One ranking for each workload and layout, in the order of the rows."""
    groups: dict[tuple[str, str], list[PlanRow]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.layout), []).append(row)
    return [_ranking(workload, layout, group) for (workload, layout), group in groups.items()]


def _ranking(workload: str, layout: str, rows: Sequence[PlanRow]) -> Ranking:
    once = list({row.plan_digest: row for row in rows}.values())
    agree = disagree = unresolved = 0
    for i, a in enumerate(once):
        for b in once[:i]:
            difference = abs(a.measured_ns - b.measured_ns) / min(a.measured_ns, b.measured_ns)
            if difference <= max(a.noise, b.noise) + max(a.relative_error, b.relative_error):
                unresolved += 1
            elif (a.measured_ns < b.measured_ns) == (a.predicted_ns < b.predicted_ns):
                agree += 1
            else:
                disagree += 1
    pairs = agree + disagree + unresolved
    winner = min(rows, key=lambda r: r.measured_ns)
    baselines = [r for r in rows if r.policy in ("hf-peft", "sl-peft")]
    return Ranking(
        workload=workload,
        layout=layout,
        kendall_tau=kendall_tau_b([r.predicted_ns for r in once], [r.measured_ns for r in once]),
        resolved_tau=(agree - disagree) / (agree + disagree) if agree + disagree else None,
        unresolved=unresolved / pairs if pairs else 0.0,
        predicted_winner=min(rows, key=lambda r: r.predicted_ns).policy,
        winner=winner.policy,
        speedup_over=tuple((r.policy, r.measured_ns / winner.measured_ns) for r in baselines),
    )
