"""Cases of a planners' suite: one small file each, with workload, cluster, and the layouts that every policy picks from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.costs import choose_cost
from muxtune.experiments.commands.problem import Options, Problem
from muxtune.policies.choices import Choices
from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.workload import workload_of
from muxtune.spec.errors import InputError
from muxtune.spec.files import read_data, validate
from muxtune.spec.layout import Layout, LayoutChoice, even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import noun

#: The suite that comes with the package; tests/suite_rule.py has its rule.
SUITE = Path(__file__).parent / "data" / "suite"
#: What a case has beside the keys of a workload file.
OWN_KEYS = ("cluster", "layouts", "microbatches")


@noun
class Degrees:
    """One layout of a case."""

    tp: int = 1
    pp: int = 1
    dp: int = 1


@noun
class CaseFile:
    """The keys of a case beside its workload; `cluster` is a name or a file as for --cluster."""

    cluster: str
    layouts: tuple[Degrees, ...]
    microbatches: int

    def __post_init__(self) -> None:
        if not self.layouts:
            raise ValueError("layouts is empty: list at least one, such as {tp: 1, pp: 4, dp: 1}")
        if self.microbatches < 1:
            raise ValueError(f"microbatches={self.microbatches}: must be at least 1")


def case_files(folder: Path) -> tuple[Path, ...]:
    """The YAML files of a folder, by name.

    Raises:
        InputError: there is none.
    """
    found = tuple(sorted(folder.glob("*.yaml")))
    if not found:
        raise InputError(f"{folder}: holds no *.yaml: give a folder of cases, or none for the suite that comes along")
    return found


def read_case(path: Path, options: Options) -> Problem:
    """A case as a problem over its layouts, all with the same number of micro-batches.

    A task entry with `count: n` stands for n equal tasks, `TASK_ID1` to `TASK_IDn`.

    Raises:
        InputError: the file, the path inside it, the value and the remedy.
    """
    data = read_data(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping with model, tasks, cluster, layouts and microbatches")
    case = validate(CaseFile, {key: data[key] for key in OWN_KEYS if key in data}, str(path))
    rest = {key: value for key, value in data.items() if key not in OWN_KEYS}
    workload = workload_of({**rest, "tasks": _expanded(rest.get("tasks"), path)}, path)
    cluster = read_cluster(case.cluster)
    layouts = [_layout(workload.model, d, cluster.size, f"{path}: layouts.{i}") for i, d in enumerate(case.layouts)]
    kept = tuple(LayoutChoice(layout=layout, microbatches=case.microbatches) for layout in layouts)
    return Problem(
        workload=workload,
        cluster=cluster,
        layout=layouts[0],
        microbatches=case.microbatches,
        chosen=choose_cost(options.cost, cluster, workload, layouts, options.allow_extrapolation),
        options=options,
        choices=Choices(kept=kept, pruned_shape=0, pruned_memory=0),
    )


def _layout(model: ModelSpec, degrees: Degrees, devices: int, place: str) -> Layout:
    try:
        layout = even_layout(model, tp=degrees.tp, pp=degrees.pp, dp=degrees.dp)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    if layout.ranks > devices:
        raise InputError(f"{place}: {layout.name} needs {layout.ranks} devices, the cluster has {devices}: lower one")
    return layout


def _expanded(entries: Any, path: Path) -> Any:
    """Entries with a `count` multiplied; anything that is no list of mappings is left to validation."""
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        return entries
    return [task for index, entry in enumerate(entries) for task in _tasks(entry, f"{path}: tasks.{index}")]


def _tasks(entry: dict[str, Any], place: str) -> Sequence[dict[str, Any]]:
    if "count" not in entry:
        return [entry]
    count = entry["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"{place}.count = {count}: give a whole number of at least 1, or leave it out")
    rest = {key: value for key, value in entry.items() if key != "count"}
    return [{**rest, "task_id": f"{entry.get('task_id', '')}{n}"} for n in range(1, count + 1)]
