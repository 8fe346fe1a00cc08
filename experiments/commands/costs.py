"""Which cost model a command takes: the one that --cost names or, with `auto`, a recorded profile that covers what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxtune.experiments.commands.inputs import COSTS, load_cost, profile_roots
from muxtune.experiments.commands.rows import cost_body
from muxtune.profiler.coverage import missing
from muxtune.profiler.provenance import foreign
from muxtune.profiler.store import Meta
from muxtune.sim.cost.base import CostModel
from muxtune.sim.cost.table import FittedTable, Table
from muxtune.spec.cluster import Cluster
from muxtune.spec.files import read_noun
from muxtune.spec.layout import Layout
from muxtune.spec.task import Workload

AUTO = "auto"
META = "meta.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostChoice:
    """A cost model, why it was taken, and what a reader of its figures should know."""

    model: CostModel
    why: str = ""
    notes: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """`cost_model` of a result."""
        return {**cost_body(self.model), "why": self.why, "notes": list(self.notes)}


def choose_cost(
    reference: str,
    cluster: Cluster,
    workload: Workload,
    layouts: Sequence[Layout],
    allow_extrapolation: bool = False,
) -> CostChoice:
    """What `reference` names; `auto` takes the first recorded profile that covers the workload, else `roofline`.

    Raises:
        UnknownKeyError, InputError: as `load_cost`.
    """
    if reference != AUTO:
        return CostChoice(model=load_cost(reference, cluster, allow_extrapolation), notes=_notes(Path(reference)))
    refused: list[str] = []
    for folder in recorded():
        fitted = read_noun(FittedTable, folder / COSTS)
        if fitted.device != cluster.device.name:
            continue
        if lacks := _lacks(folder, fitted, workload, layouts):
            refused.append(f"{folder.name} lacks {lacks}")
            continue
        table = Table(fitted, cluster.device, allow_extrapolation)
        return CostChoice(model=table, why=f"auto: recorded profile {folder.name}", notes=_notes(folder))
    reason = "; ".join(refused) or f"no recorded profile of {cluster.device.name}"
    return CostChoice(model=load_cost("roofline", cluster), why=f"auto: {reason}")


def recorded() -> tuple[Path, ...]:
    """Folders with a fitted profile under the roots, by name."""
    return tuple(sorted(path.parent for root in profile_roots() for path in root.glob(f"*/{COSTS}")))


def _lacks(folder: Path, fitted: FittedTable, workload: Workload, layouts: Sequence[Layout]) -> str:
    if (folder / META).is_file() and read_noun(Meta, folder / META).model != workload.model:
        return f"figures of {workload.model.name}"
    absent = missing(fitted, workload, layouts)
    return absent[0] + (f" and {len(absent) - 1} more" if len(absent) > 1 else "") if absent else ""


def _notes(path: Path) -> tuple[str, ...]:
    """Where the figures of a CPU were measured, if not here."""
    folder = path if path.is_dir() else path.parent
    roots = (folder, *(root / path for root in profile_roots()))
    meta = next((f / META for f in roots if (f / META).is_file() and (f / COSTS).is_file()), None)
    if meta is None:
        return ()
    found = read_noun(Meta, meta)
    return foreign(found.provenance) if found.device == "cpu" else ()
