"""run_cell: replay one cell, and say what was found and what a reader has to know of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from muxtune.experiments.commands.rows import cost_body
from muxtune.experiments.replay_cell import Bench, Cell
from muxtune.sim.cluster.engine import Replay
from muxtune.sim.cluster.figures import figures
from muxtune.sim.cluster.prices import Prices, Shelf
from muxtune.sim.cluster.tally import Told
from muxtune.spec.model import model_preset
from muxtune.spec.noun import digest

#: Predictions by co-scheduling policy and all else that they depend on.
Shelves = dict[tuple[Any, ...], Shelf]
#: What a clock decides; left out of digests.
CLOCKED = ("wall_s", "cpu_s", "decision_us")


def run_cell(
    cell: Cell,
    stop: Callable[[], bool] | None = None,
    report: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
    told: Told | None = None,
    shelves: Shelves | None = None,
) -> dict[str, Any]:
    """Replay one cell; `report` may ask for what is known so far now and then, `told` one dict a job that has left.

    `shelves` keep predictions for other cells; results do not depend on them.

    Raises:
        InputError: wrong file, name or option, or a bad row of the trace.
    """
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    bench = Bench(cell)
    kept = {} if shelves is None else shelves
    shelf, solo = (kept.setdefault((p.policy, *bench.priced_with), Shelf(p)) for p in (bench.pricer, bench.solo))
    quick = None
    if bench.quick is not None:
        quick = kept.setdefault(("incremental", bench.quick.most, cell.policy, *bench.priced_with), Shelf(bench.quick))
    merge = bench.merge() if cell.merge_types else None
    prices = Prices(shelf, solo, merge=merge, quick=quick, seed=cell.seed)
    replay = Replay(bench.trace, bench.rules, bench.setup(stop), prices, told)

    def body() -> dict[str, Any]:
        return _body(bench, replay, time.perf_counter() - wall_s, time.process_time() - cpu_s)

    replay.run(None if report is None else lambda _: report(lambda: body() | {"complete": False}))
    return body()


def _body(bench: Bench, replay: Replay, wall_s: float, cpu_s: float) -> dict[str, Any]:
    cell, about = bench.cell, bench.trace.about
    found = {
        "trace": about.name,
        "trace_source": about.source,
        "cluster": " + ".join(c.name for c in bench.clusters),
        "policy": cell.policy,
        "cluster_policy": cell.cluster_policy,
        "seed": cell.seed,
        **figures(replay, cell.gpu_hour_price),
        "cost_model": cost_body(bench.cost_of(bench.clusters[0])),
        "instances": bench.layouts(),
        "tasks_per_instance": bench.cap,
        "statements": [*about.statements(), *bench.cost_reasons, *_assumed(bench)],
        "cell": cell.key,
        "cell_group": replace(cell, seed=0).key,
    }
    clocked = {"wall_s": wall_s, "cpu_s": cpu_s, "decision_us": _decisions(replay)}
    return {**found, **clocked, "digest": digest(found)}


def _assumed(bench: Bench) -> list[str]:
    """What a reader has to know of the fleet."""
    costs = bench.setup().costs
    reference = {n: bench.reference(model_preset(n)) for n in bench.layouts()}
    places = "; ".join(f"{n}: {bench.slice(model_preset(n)).name}, {c.name}" for n, c in reference.items())
    return [
        f"reference instance: {places or 'none asked'}",
        f"changes of an instance take {costs.replan_ns / 1e9:g} s + {costs.join_ns / 1e9:g} s a task that comes + "
        f"{costs.leave_ns / 1e9:g} s a task that goes; a start {costs.start_ns / 1e9:g} s + weights at "
        f"{costs.load_bytes_per_s / 1e9:g} GB/s a device; a checkpoint every {costs.checkpoint_ns / 1e9:g} s is read in "
        f"{costs.migrate_ns / 1e9:g} s (assumed unless given by --costs)",
    ]


def _decisions(replay: Replay) -> dict[str, float | None]:
    """Microseconds that decisions took on this machine: arrival and dispatch, plans that were not known included."""
    times = sorted(replay.decision_s)
    if not times:
        return dict.fromkeys(("mean", "p50", "p99", "max"))
    at = {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100], "max": times[-1]}
    return {"mean": 1e6 * sum(times) / len(times), **{name: 1e6 * value for name, value in at.items()}}
