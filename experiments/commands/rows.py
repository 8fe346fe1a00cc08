"""One row a plan, in the keys that scripts rely on (DESIGN §11), and the tables made of such rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from muxtune.experiments.console import table
from muxtune.policies.objectives.base import require_objective, values
from muxtune.sim.cost.base import CostModel
from muxtune.spec.estimate import Estimate
from muxtune.spec.noun import plain
from muxtune.spec.plan import Plan, SolverRecord
from muxtune.spec.units import format_bytes, format_ns

UNCALIBRATED = "uncalibrated: data sheet figures, nothing was measured; profile the device and give --cost DIR"

FIGURES = (
    *("iteration_ns", "spread", "draws", "raw_tokens_per_s", "billed_tokens_per_s", "processed_tokens_per_s"),
    *("peak_bytes", "peak_bytes_per_rank", "bubble_fraction", "exposed_comm_fraction", "host_bound_fraction"),
    *("energy_j", "truncated_tokens", "extrapolated_fraction", "relative_error", "plan_seconds", "solver"),
    *("plan_digest", "per_task", "chosen_layouts", "chosen_microbatches", "layout_search"),
    *("utilisation", "mfu", "mfu_billed", "stalls", "joules_per_billed_token", "energy_idle_j", "energy_dynamic_j"),
    "objectives",
    *("sharing", "corun_slowed_fraction", "corun_default_fraction"),
)


def feasible_row(policy: str, plan: Plan, found: Estimate, objectives: Sequence[str] = ()) -> dict[str, Any]:
    """The row of a plan and what is predicted of it; `objectives` adds some of one's own to those of the folder.

    A task's slowdown is its time from step to step against running alone (policies/alone.py fills it in).
    """
    rates = {f"{kind}_per_s": found.rate_per_s(getattr(found, kind)) for kind in _TOKENS}
    same = ("iteration_ns", "spread", "draws", "bubble_fraction", "exposed_comm_fraction", "host_bound_fraction")
    more = ("energy_j", "truncated_tokens", "extrapolated_fraction", "relative_error")
    last = (
        *("utilisation", "mfu", "mfu_billed", "joules_per_billed_token", "energy_idle_j", "energy_dynamic_j"),
        *("corun_slowed_fraction", "corun_default_fraction"),
    )
    figures: dict[str, Any] = {
        **{name: getattr(found, name) for name in (*same, *more, *last)},
        "sharing": plan.sharing,
        "stalls": {share.cause: share.fraction for share in found.stalls},
        **rates,
        "peak_bytes": max(found.peak_bytes),
        "peak_bytes_per_rank": list(found.peak_bytes),
        "plan_seconds": plan.provenance.plan_seconds,
        "solver": _solver(plan.made_by.solver),
        "plan_digest": plan.decision_digest(),
        "per_task": {row.pop("task"): row for row in map(plain, found.per_task)},
        "chosen_layouts": sorted({i.layout.name for i in plan.instances}),
        "chosen_microbatches": sorted({i.microbatches for i in plan.instances}),
        "layout_search": plain(plan.made_by.layouts) if plan.made_by.layouts else None,
        "objectives": values(plan.workload, found, objectives),
    }
    return {"policy": policy, "feasible": True, "reason": "", **{name: figures[name] for name in FIGURES}}


def infeasible_row(policy: str, reason: str) -> dict[str, Any]:
    """The row of a policy that gave no plan."""
    return {"policy": policy, "feasible": False, "reason": reason, **dict.fromkeys(FIGURES)}


_TOKENS = ("raw_tokens", "billed_tokens", "processed_tokens")


def _solver(record: SolverRecord | None) -> dict[str, Any] | None:
    """name, status, bound_ns and gap first; what else the solver recorded follows."""
    if record is None:
        return None
    body: dict[str, Any] = plain(record)
    return {name: body.pop(name) for name in ("name", "status", "bound_ns", "gap")} | body


def cost_body(cost: CostModel) -> dict[str, Any]:
    """id and calibrated."""
    return {"id": cost.model_id, "calibrated": cost.calibrated}


def cost_text(body: dict[str, Any]) -> str:
    """The cost model with a flag where nothing was measured, why it was taken, and what to know of it."""
    text = f"cost model {body['id']}" + ("" if body["calibrated"] else " (UNCALIBRATED)")
    return "; ".join(filter(None, (text, body.get("why"), *body.get("notes", ()))))


def objective_text(name: str, value: float | None) -> str:
    """A value with its unit."""
    if value is None:
        return "-"
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{digits} {require_objective(name).unit}".rstrip()


def corun_text(row: dict[str, Any]) -> Iterator[str]:
    """What instances that run at once take from each other, and what that figure rests on; nothing where none do."""
    if row["corun_slowed_fraction"] is not None:
        yield (
            f"{row['policy']}: instances run at once on a device and take {percent(row['corun_slowed_fraction'])} of its time "
            f"from each other, {percent(row['corun_default_fraction'])} of that by a stated default, the rest by measured pairs"
        )


def percent(value: float | None) -> str:
    """A fraction as a percentage."""
    return "-" if value is None else f"{100 * value:.1f} %"


def figures_table(rows: Sequence[dict[str, Any]], best: str | None = None, objectives: Sequence[str] = ()) -> Any:
    """Feasible rows as a table, with a column for each objective that is asked for; the best one carries a star."""
    names = ["policy", "iteration", "billed tok/s", "processed tok/s", "peak mem", "J/billed tok", "model error"]
    if any(row["extrapolated_fraction"] for row in rows):
        names.append("extrapolated")
    cells = [_cells(row, best, "extrapolated" in names) for row in rows]
    shown = [o for o in objectives if o != "throughput"]
    names += shown
    for row, line in zip(rows, cells, strict=True):
        line[-1:] = [*(objective_text(o, row["objectives"][o]) for o in shown), line[-1]]
    if not any(row["layout_search"] for row in rows):
        return table([*names, "plan s"], cells)
    return table([*names, "plan s", "layout"], [[*c, _layout_text(row)] for c, row in zip(cells, rows, strict=True)])


def _layout_text(row: dict[str, Any]) -> str:
    """The layouts that were picked, and C."""
    layouts = row["chosen_layouts"] if len(row["chosen_layouts"]) < 3 else [f"{len(row['chosen_layouts'])} layouts"]
    return f"{' | '.join(layouts)} C={','.join(map(str, row['chosen_microbatches']))}"


#: Headings of the causes in tables.
CAUSE_NAMES = {
    "compute": "compute",
    "exposed_collective": "collectives",
    "p2p_wait": "p2p",
    "pipeline_bubble": "bubble",
    "host_wait": "host",
    "optimizer_step": "step",
    "unexplained": "unexplained",
}


def time_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Where the device-time of feasible rows goes: the causes add up to 100 %."""
    causes = [c for c in CAUSE_NAMES if c != "unexplained" or any(r["stalls"].get(c) for r in rows)]
    names = ["device time", *(CAUSE_NAMES[c] for c in causes), "utilisation", "MFU"]
    cells = [
        [r["policy"], *(percent(r["stalls"].get(c)) for c in causes), percent(r["utilisation"]), percent(r["mfu"])]
        for r in rows
    ]
    return table(names, cells)


def _cells(row: dict[str, Any], best: str | None, extrapolated: bool) -> list[str]:
    spread = f" ±{100 * row['spread']:.1f} %" if row["spread"] else ""
    return [
        row["policy"] + (" *" if row["policy"] == best else ""),
        format_ns(row["iteration_ns"]) + spread,
        f"{row['billed_tokens_per_s']:,.0f}",
        f"{row['processed_tokens_per_s']:,.0f}",
        format_bytes(row["peak_bytes"]),
        "-" if row["joules_per_billed_token"] is None else f"{row['joules_per_billed_token']:.3g}",
        percent(row["relative_error"]),
        *([percent(row["extrapolated_fraction"])] if extrapolated else []),
        f"{row['plan_seconds']:.2f}",
    ]


def energy_text(row: dict[str, Any]) -> str:
    """Energy of one iteration, idle and dynamic."""
    if row["energy_j"] is None:
        return "energy: the cost model has no figures"
    parts = f"{row['energy_idle_j']:,.1f} J idle, {row['energy_dynamic_j']:,.1f} J dynamic"
    return f"energy of an iteration {row['energy_j']:,.1f} J: {parts} (data sheet watts, links left out)"


def task_table(per_task: dict[str, Any]) -> Any:
    """Step time and slowdown of every task."""
    rows = [
        [task, format_ns(row["step_ns"]), "-" if row["slowdown"] is None else f"{row['slowdown']:.2f}x"]
        for task, row in per_task.items()
    ]
    return table(["task", "step", "slowdown vs alone"], rows)
