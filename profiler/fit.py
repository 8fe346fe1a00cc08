"""fit: measured rows → a FittedTable. A time is the median over rounds of wall / reference, times the median reference.

An overhead is what the executor's nodes took beyond Σ their operators, at each number of tokens and per direction: of the
attention and of the MLP blocks of a stage (a block each), then of the stage (once).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pandas as pd

from muxtune.profiler.cases import EMPTY, EMPTY_LORA, PASSAGE, Case, block_of, passage_batch, passage_stage
from muxtune.profiler.store import Meta, Store
from muxtune.sim.cost.base import total
from muxtune.sim.cost.table import Curve, FittedTable, Point, Table, fit_table
from muxtune.spec.catalogue import StageContext, stage_subgraphs, subgraph_ops
from muxtune.spec.cluster import device_presets
from muxtune.spec.ops import CHUNK_ATTENTION, Direction
from muxtune.spec.peft import peft_kinds
from muxtune.spec.plan import Provenance
from muxtune.spec.task import Task

#: Direction of the families that are stored beside the cases (messages).
MESSAGE_FAMILIES = ("send", "p2p", "recv")
DIRECTIONS: tuple[Literal["forward"], Literal["backward"]] = ("forward", "backward")


def fit(folder: Path, tasks: Iterable[Task]) -> FittedTable:
    """Fit every curve of a profile folder; `tasks` are the workload's (passage cases name one of them).

    Raises:
        InputError: the folder holds no finished round.
    """
    store = Store(folder)
    meta, rows = store.meta(), store.rows()
    device = device_presets()[meta.device]
    reference_ns = int(rows["reference_ns"].median())
    medians = _medians(rows, reference_ns, meta.device != "cpu")
    born = meta.provenance
    revisions = ", ".join(dict.fromkeys(rows["revision"]))
    provenance = Provenance(
        environment=f"{born.device}, {born.driver}, {', '.join(born.libraries)}, revision {revisions}"
    )
    curves = _operator_curves(meta, medians)
    for part in ("block", "stage"):
        table = Table(fit_table(curves, device, reference_ns, provenance), device, allow_extrapolation=True)
        curves += _Overheads(meta, medians, table, list(tasks)).curves(part)
    return fit_table(curves, device, reference_ns, provenance)


Medians = dict[tuple[int, str], Point]


def _medians(rows: pd.DataFrame, reference_ns: int, with_host: bool = False) -> Medians:
    """(case, direction) → median ratio to the reference, back in ns, with its p20–p80 spread. Size is filled in later.

    `with_host`: a device beside its host, where the median time to issue is kept too.
    """
    rows = rows.assign(ratio=rows["wall_ns"] / rows["reference_ns"])
    grouped = rows.groupby(["case", "direction"], sort=True)["ratio"]
    quantiles = pd.DataFrame(
        {name: grouped.quantile(share) for name, share in (("low", 0.2), ("middle", 0.5), ("high", 0.8))}
    )
    quantiles["host"] = rows.groupby(["case", "direction"], sort=True)["cpu_ns"].median()
    found: Medians = {}
    for (case, direction), low, middle, high, host in quantiles.itertuples(name=None):
        spread = (high - low) / middle if middle else 0.0
        found[int(case), str(direction)] = Point(
            size=(),
            p50_ns=max(1, round(middle * reference_ns)),
            spread=float(spread),
            host_ns=round(host) if with_host else None,
        )
    return found


def _sized(point: Point, size: tuple[int, ...], harness_ns: int = 0) -> Point:
    """The point at its size without what timing it cost; at least a tenth of the measurement is left."""
    net_ns = max(point.p50_ns - harness_ns, -(-point.p50_ns // 10))
    return replace(point, size=size, p50_ns=net_ns)


#: Autograd graphs that one case of a family runs beside the one that its node runs anyway (query and key are rotated apart).
#: The head's node is not part of a layer: its graph stays with the cross entropy.
GRAPHS = {
    **dict.fromkeys(
        ("linear", "rmsnorm", "layernorm", "attention", CHUNK_ATTENTION, "swiglu", "geglu", "gelu", "relu"), 1
    ),
    "rope": 2,
}


def _harness_ns(meta: Meta, medians: Medians) -> dict[tuple[str, str], int]:
    """(family, direction) → time of the empty graphs, or of the empty adapter call, in one case of the family."""
    index = {case.family: i for i, case in enumerate(meta.cases) if case.family in (EMPTY, EMPTY_LORA)}
    found: dict[tuple[str, str], int] = {}
    for direction in ("forward", "backward"):
        empty_ns = medians[index[EMPTY], direction].p50_ns
        found |= {(family, direction): count * empty_ns for family, count in GRAPHS.items()}
        found |= {(kind, direction): medians[index[EMPTY_LORA], direction].p50_ns for kind in peft_kinds()}
    found |= {(kind, "weights"): found[kind, "backward"] for kind in peft_kinds()}
    return found


def _operator_curves(meta: Meta, medians: Medians) -> list[Curve]:
    """One curve an operator group, layers left out."""
    points: dict[tuple[str, Direction, str, tuple[int, ...]], dict[tuple[int, ...], Point]] = {}
    harness = _harness_ns(meta, medians)
    for index, case in enumerate(meta.cases):
        if case.family in (PASSAGE, EMPTY, EMPTY_LORA):
            continue
        for direction in ("forward", "backward", "weights"):
            point = medians.get((index, direction))
            if point is not None and not (case.direction == "weights" and direction == "forward"):
                net = _sized(point, case.size, harness.get((case.family, direction), 0))
                points.setdefault((case.family, direction, case.dtype, case.shape), {})[case.size] = net
    for offset, size_bytes in enumerate(meta.message_bytes):
        for family in MESSAGE_FAMILIES:
            point = medians[len(meta.cases) + offset, family]
            points.setdefault((family, "forward", "bytes", ()), {})[size_bytes,] = _sized(point, (size_bytes,))
    for offset, ranks in enumerate(meta.meeting_ranks, start=len(meta.cases) + len(meta.message_bytes)):
        meeting = _sized(medians[offset, "all_reduce"], (4,))
        points.setdefault(("all_reduce", "forward", "bytes", (ranks,)), {})[(4,)] = meeting
    for place, case in enumerate(meta.shared, start=meta.first_shared):
        for direction in DIRECTIONS:
            if (place, direction) in medians:
                point = _sized(medians[place, direction], case.size)
                points.setdefault((case.family, direction, case.dtype, case.shape), {})[case.size] = point
    return [
        Curve(
            family=family,
            direction=direction,
            dtype=dtype,
            shape=shape,
            points=tuple(p for _, p in sorted(sizes.items())),
        )
        for (family, direction, dtype, shape), sizes in points.items()
    ]


class _Overheads:
    """Measured passages less what a table says of the operators in them."""

    def __init__(self, meta: Meta, medians: Medians, table: Table, tasks: Sequence[Task]) -> None:
        self.meta, self.medians, self.table, self.tasks = meta, medians, table, {t.task_id: t for t in tasks}
        self.passages = [(i, c) for i, c in enumerate(meta.cases) if c.family == PASSAGE]

    def curves(self, part: str) -> list[Curve]:
        """Of the blocks, from the passages through a whole model; or, blocks being in the table, of every kind of stage."""
        found: dict[tuple[str, Direction, tuple[int, ...]], list[Point]] = {}
        for index, case in self.passages:
            if part == "block" and case.shape == (1, 1):
                shape = (self.meta.model.hidden, self.meta.model.ffn_hidden)
                for direction in DIRECTIONS:
                    for block in ("attention", "mlp"):
                        point = self._rest(index, case, direction, block)
                        found.setdefault((block, direction, shape), []).append(point)
            elif part == "stage":
                for direction in DIRECTIONS:
                    point = self._rest(index, case, direction, None)
                    found.setdefault(("stage", direction, case.shape), []).append(point)
        return [
            Curve(
                family=f"{name}_overhead", direction=d, dtype=self.meta.model.dtype, shape=shape, points=tuple(points)
            )
            for (name, d, shape), points in found.items()
        ]

    def _rest(self, index: int, case: Case, direction: Literal["forward", "backward"], block: str | None) -> Point:
        """What is left of the nodes of a block (each), or of all nodes, when the operators in them are taken off."""
        measured = self.medians[index, f"{direction}.{block}" if block else direction]
        task = self.tasks[case.task]
        layout, stage = passage_stage(self.meta.model, case.shape)
        context = StageContext(model=self.meta.model, layout=layout, stage=stage, adapters=((task.task_id, task.peft),))
        groups = subgraph_ops(context, passage_batch(task, case.size[0]), direction)
        subgraphs = stage_subgraphs(layout, stage, direction)
        inside = [s.index for s in subgraphs if block is None or block_of(layout, stage, s) == block]
        own = f"{block or 'stage'}_overhead"
        operators = [op for i in inside for op in groups[i] if op.family != own]
        shares = sum(op.family == own for i in inside for op in groups[i])
        rest_ns = (measured.p50_ns - total(self.table, self.table.device, operators).p50_ns) / shares
        return Point(size=case.size, p50_ns=round(rest_ns), spread=measured.spread)
