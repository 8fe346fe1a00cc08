"""simulate: a Plan through the SimPy engines; figures are means over draws, the timeline is the first draw's."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.costs import AUTO, choose_cost
from muxtune.experiments.commands.frequencies import (
    frequency_body,
    frequency_rows,
    frequency_table,
    parse_frequencies,
)
from muxtune.experiments.commands.inputs import output_file, output_folder, read_plan
from muxtune.experiments.commands.memory import memory_rows, memory_table
from muxtune.experiments.commands.rows import (
    UNCALIBRATED,
    corun_text,
    cost_body,
    cost_text,
    energy_text,
    feasible_row,
    figures_table,
    task_table,
    time_table,
)
from muxtune.experiments.console import json_text, render
from muxtune.policies.alone import Alone
from muxtune.sim.cost._frequency import AtFrequency
from muxtune.sim.cost.base import CostModel
from muxtune.sim.simulate import Simulation, estimate, make_evaluate, simulate
from muxtune.spec.bind import bind
from muxtune.spec.check import require_valid
from muxtune.spec.chrome import chrome_trace
from muxtune.spec.files import write_text
from muxtune.spec.frequency import frequency_step
from muxtune.spec.memory_paper import paper_peak_bytes
from muxtune.spec.noun import digest
from muxtune.spec.plan import Plan
from muxtune.spec.units import format_bytes


def run(
    plan: Path,
    *,
    trace: Path | None = None,
    draws: int = 8,
    cost: str = AUTO,
    allow_extrapolation: bool = False,
    seed: int = 0,
    out: Path | None = None,
    frequency: int | None = None,
    frequencies: str = "",
) -> dict[str, Any]:
    """One row of `compare` with per-task times and the engine's speed; `out` gets simulate.json, trace.json and pictures.

    `memory` has every rank's peak by kind, of the first draw; `paper_peak_bytes` is Eq. 5, all tasks in flight at once.

    Raises:
        InputError: wrong file, name or option. PlanError: the plan cannot be executed.
        ExtrapolationError: the cost model has no figure for an operator.
    """
    traces = [output_file(trace, "--trace")] if trace else []
    traces += [output_folder(out) / "trace.json"] if out else []
    found = read_plan(plan)
    device = found.cluster.device
    step = None if frequency is None else frequency_step(device, frequency)
    steps = parse_frequencies(frequencies, device)
    layouts = list(dict.fromkeys(i.layout for i in found.instances))
    chosen = choose_cost(cost, found.cluster, found.workload, layouts, allow_extrapolation)
    measured = chosen.model
    model: CostModel = measured if step is None else AtFrequency(measured, step)
    require_valid(found, seed, str(plan))
    bound = bind(found, seed=seed, steps=math.lcm(*(i.steps for i in found.instances)))
    started_s = time.process_time()
    simulation = simulate(bound, model)
    cpu_s = time.process_time() - started_s
    paper = paper_peak_bytes(found)
    body = {
        **_figures(found, model, seed, draws),
        "cost_model": {**chosen.body(), **cost_body(model)},
        "memory": memory_rows(bound, simulation.timeline),
        "memory_bytes": device.memory_bytes,
        "paper_peak_bytes": max(paper),
        "paper_peak_bytes_per_rank": list(paper),
        **({"frequency": frequency_body(step)} if step else {}),
        **({"frequencies": frequency_rows(found, measured, steps, seed, draws)} if steps else {}),
        "timeline_digest": digest(simulation.timeline),
        "program_digest": bound.program.digest(),
        "events": simulation.events,
        "events_per_cpu_s": simulation.events / cpu_s if cpu_s > 0 else None,
        "stages_simulated": simulation.stages_simulated,
        "stages_reused": simulation.stages_reused,
    }
    for path in traces:
        write_text(path, json.dumps(chrome_trace([(f"{found.made_by.policy} (simulated)", simulation.timeline)])))
    if out:
        write_text(out / "simulate.json", json_text(body))
        _write_pictures(found, simulation, out)
    return body


def _figures(plan: Plan, model: CostModel, seed: int, draws: int) -> dict[str, Any]:
    """What is predicted of a plan, means over draws."""
    predicted = Alone(make_evaluate(model, seed, draws)).slowdowns(plan, estimate(plan, model, seed, draws))
    return {
        "workload": plan.workload.name,
        "cluster": plan.cluster.name,
        "seed": seed,
        **feasible_row(plan.made_by.policy, plan, predicted),
    }


def _write_pictures(plan: Plan, simulation: Simulation, out: Path) -> None:
    from muxtune.experiments.plots.timeline import pictures

    for name, svg in pictures(simulation.timeline, plan.cluster.device.memory_bytes):
        write_text(out / name, svg)


def show(body: dict[str, Any]) -> str:
    """The row, where the time goes, the tasks, the digest of the timeline."""
    rate = f", {body['events_per_cpu_s']:,.0f} a CPU second" if body["events_per_cpu_s"] else ""
    assumed = [body["frequency"]] if "frequency" in body else body.get("frequencies", [])[-1:]
    return render(
        f"{body['workload']} on {body['cluster']}, seed {body['seed']}, {cost_text(body['cost_model'])}",
        figures_table([body]),
        time_table([body]),
        energy_text(body),
        task_table(body["per_task"]),
        memory_table(body["memory"], body["memory_bytes"]),
        f"peak by Eq. 5 (every task in flight at once, no adapters, no workspace): {format_bytes(body['paper_peak_bytes'])}",
        *([frequency_table(body["frequencies"])] if "frequencies" in body else []),
        *corun_text(body),
        f"timeline {body['timeline_digest']}, {body['events']:,} events{rate}; "
        f"{body['stages_simulated']} stage clocks simulated, {body['stages_reused']} reused",
        *(row["assumption"] for row in assumed),
        *([] if body["cost_model"]["calibrated"] else [UNCALIBRATED]),
    )
