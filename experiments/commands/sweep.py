"""sweep: every combination of the axes of a grid file, spread over processes or Ray; a killed sweep is taken up again."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import Progress, silent
from muxtune.experiments.commands.problem import parse_microbatches
from muxtune.experiments.commands.replay import parse_costs, parse_faults, run_all, show
from muxtune.experiments.commands.trace import Given, mapping_texts
from muxtune.experiments.replay_cell import Cell
from muxtune.experiments.spread import Engine
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.files import read_data

#: Keys of a grid that are not fields of a Cell, and those that have another form there.
MAPPED = ("models", "ranks", "datasets", "batches", "tenants", "mean", "std", "deadline_slack", "cancel_share")
TRACE = ("trace", "format", "first", "start_day", "days", "gpus", "skip_bad")
OTHER = ("cluster", "costs", "faults", "microbatches", "seed", "seeds")
DIRECT = tuple(
    f.name
    for f in fields(Cell)
    if f.name not in ("given", "clusters", "costs", "faults", "fault_rates", "microbatches", "seed")
)
KEYS = (*TRACE, *MAPPED, *OTHER, *DIRECT)

__all__ = ["read_grid", "run", "show"]


def run(
    grid: Path, *, engine: Engine = "pool", jobs: int = 1, out: Path, resume: bool = True, progress: Progress = silent
) -> dict[str, Any]:
    """Run every cell of a grid; results in `out` are taken as they are where `resume`.

    Raises:
        InputError: a wrong grid, by key and value.
    """
    cells, axes = read_grid(grid)
    group = ("trace", "trace_source", "cluster", "policy", "cluster_policy", "cell_group")
    body = run_all(cells, engine=engine, jobs=jobs, resume=resume, out=out, progress=progress, group=group)
    rows = body.get("rows", [body])
    return {"grid": str(grid), "axes": axes, "complete": body["complete"], "replays": len(cells)} | {
        "rows": rows,
        "means": body.get("means", []),
    }


def read_grid(path: Path) -> tuple[list[Cell], list[str]]:
    """The cells of a grid file and the names of its axes: a key with a list of values is an axis, `seeds: N` is N seeds.

    Raises:
        InputError: an unknown key or a wrong value.
    """
    data = read_data(path)
    if not isinstance(data, dict) or "trace" not in data or "cluster" not in data:
        raise InputError(f"{path}: expected a mapping with trace, cluster and other options of `muxtune replay`")
    unknown = sorted(set(data) - set(KEYS))
    if unknown:
        raise UnknownKeyError(f"key in {path}", str(unknown[0]), KEYS)
    seeds = data.pop("seeds", 1)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise InputError(f"{path}: seeds={seeds!r}: expected a whole number, at least 1")
    axes = [name for name, value in data.items() if isinstance(value, list)]
    choices = [data[name] if name in axes else [data[name]] for name in data]
    if not all(choices):
        raise InputError(f"{path}: {next(n for n, c in zip(data, choices, strict=True) if not c)}: the list is empty")
    cells: list[Cell] = []
    for values in itertools.product(*choices):
        cell = _cell(dict(zip(data, values, strict=True)), path)
        cells += [replace(cell, seed=cell.seed + s) for s in range(seeds)]
    return cells, axes


def _cell(row: dict[str, Any], path: Path) -> Cell:
    def text(name: str) -> str:
        value = row.get(name, "")
        return str(value) if value is not None else ""

    wrong = [n for n, v in row.items() if v is not None and not isinstance(v, (str, int, float, bool))]
    if wrong:
        raise InputError(f"{path}: {wrong[0]}={row[wrong[0]]!r}: expected a text or a number, or a list of them")
    given = Given(
        source=text("trace"),
        format_key=text("format") or "auto",
        mapping=mapping_texts(*(text(name) for name in MAPPED)),
        gpus=text("gpus"),
        skip_bad=bool(row.get("skip_bad", False)),
        first=row.get("first"),
        start_day=float(row.get("start_day", 0.0)),
        days=row.get("days"),
    )
    rates, faults = parse_faults(text("faults"))
    direct = {name: row[name] for name in DIRECT if name in row}
    for name, value in direct.items():
        _require_kind(name, value, path)
    return Cell(
        given=given,
        clusters=tuple(text("cluster").split()),
        costs=parse_costs(text("costs")),
        fault_rates=rates,
        faults=faults,
        microbatches=parse_microbatches(text("microbatches") or "4"),
        seed=int(row.get("seed", 0)),
        **direct,
    )


def _require_kind(name: str, value: Any, path: Path) -> None:
    """Refuse a value that the field of Cell does not take."""
    kind = next(str(f.type) for f in fields(Cell) if f.name == name)
    takes: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    wanted = takes[kind.split(" ")[0]]
    if value is None and "None" in kind:
        return
    if not isinstance(value, wanted) or isinstance(value, bool) != (wanted == (bool,)):
        raise InputError(f"{path}: {name}={value!r}: expected {kind}")
