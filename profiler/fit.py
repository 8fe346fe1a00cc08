"""fit: measured rows → a FittedTable. A time is the median over rounds of wall / reference, times the median reference.

layer_overhead(tokens) = (time of a layer through the executor's nodes − Σ its operators) / layers, per direction.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from muxtune.profiler.cases import EMPTY, EMPTY_LORA, LAYER, Case, layer_batch, middle_subgraphs
from muxtune.profiler.store import Meta, Store
from muxtune.sim.cost.base import total
from muxtune.sim.cost.table import Curve, FittedTable, Point, Table, fit_table
from muxtune.spec.catalogue import StageContext, subgraph_ops
from muxtune.spec.cluster import DeviceSpec, device_presets
from muxtune.spec.layout import even_layout
from muxtune.spec.ops import Direction, Op
from muxtune.spec.plan import Provenance
from muxtune.spec.task import Task

#: Direction of the families that are stored beside the cases (messages).
MESSAGE_FAMILIES = ("send", "p2p", "recv")


def fit(folder: Path, tasks: Iterable[Task]) -> FittedTable:
    """Fit every curve of a profile folder; `tasks` are the workload's (layer cases name one of them).

    Raises:
        InputError: the folder holds no finished round.
    """
    store = Store(folder)
    meta, rows = store.meta(), store.rows()
    device = device_presets()[meta.device]
    reference_ns = int(rows["reference_ns"].median())
    medians = _medians(rows, reference_ns)
    born = meta.provenance
    provenance = Provenance(
        environment=f"{born.device}, {born.driver}, {', '.join(born.libraries)}, revision {born.revision}"
    )
    operators = _operator_curves(meta, medians)
    plain = fit_table(operators, device, reference_ns, provenance)
    overhead = _overhead_curves(meta, medians, Table(plain, device, allow_extrapolation=True), device, list(tasks))
    return fit_table([*operators, *overhead], device, reference_ns, provenance)


Medians = dict[tuple[int, str], Point]


def _medians(rows: pd.DataFrame, reference_ns: int) -> Medians:
    """(case, direction) → median ratio to the reference, back in ns, with its p20–p80 spread. Size is filled in later."""
    rows = rows.assign(ratio=rows["wall_ns"] / rows["reference_ns"])
    grouped = rows.groupby(["case", "direction"], sort=True)["ratio"]
    quantiles = pd.DataFrame(
        {name: grouped.quantile(share) for name, share in (("low", 0.2), ("middle", 0.5), ("high", 0.8))}
    )
    found: Medians = {}
    for (case, direction), low, middle, high in quantiles.itertuples(name=None):
        spread = (high - low) / middle if middle else 0.0
        found[int(case), str(direction)] = Point(
            size=(), p50_ns=max(1, round(middle * reference_ns)), spread=float(spread)
        )
    return found


def _sized(point: Point, size: tuple[int, ...], harness_ns: int = 0) -> Point:
    """The point at its size without what timing it cost; at least a tenth of the measurement is left."""
    net_ns = max(point.p50_ns - harness_ns, -(-point.p50_ns // 10))
    return Point(size=size, p50_ns=net_ns, spread=point.spread)


#: Autograd graphs that one case of a family runs beside the one that its node runs anyway (query and key are rotated apart).
#: The head's node is not part of a layer: its graph stays with the cross entropy.
GRAPHS = {
    **dict.fromkeys(("linear", "rmsnorm", "layernorm", "attention", "swiglu", "geglu", "gelu", "relu"), 1),
    "rope": 2,
}


def _harness_ns(meta: Meta, medians: Medians) -> dict[tuple[str, str], int]:
    """(family, direction) → time of the empty graphs, or of the empty adapter call, in one case of the family."""
    index = {case.family: i for i, case in enumerate(meta.cases) if case.family in (EMPTY, EMPTY_LORA)}
    found: dict[tuple[str, str], int] = {}
    for direction in ("forward", "backward"):
        empty_ns = medians[index[EMPTY], direction].p50_ns
        found |= {(family, direction): count * empty_ns for family, count in GRAPHS.items()}
        found["lora", direction] = medians[index[EMPTY_LORA], direction].p50_ns
    found["lora", "weights"] = found["lora", "backward"]
    return found


def _operator_curves(meta: Meta, medians: Medians) -> list[Curve]:
    """One curve an operator group, layers left out."""
    points: dict[tuple[str, Direction, str, tuple[int, ...]], dict[tuple[int, ...], Point]] = {}
    harness = _harness_ns(meta, medians)
    for index, case in enumerate(meta.cases):
        if case.family in (LAYER, EMPTY, EMPTY_LORA):
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
    meeting = medians.get((len(meta.cases) + len(meta.message_bytes), "all_reduce"))
    if meeting is not None:
        points["all_reduce", "forward", "bytes", (2,)] = {(4,): _sized(meeting, (4,))}
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


def _overhead_curves(meta: Meta, medians: Medians, table: Table, device: DeviceSpec, tasks: list[Task]) -> list[Curve]:
    """What a layer costs beyond its operators, per direction and token count."""
    directions: tuple[Direction, Direction] = ("forward", "backward")
    points: dict[Direction, list[Point]] = {d: [] for d in directions}
    for index, case in enumerate(meta.cases):
        if case.family != LAYER:
            continue
        for direction in directions:
            measured = medians[index, direction]
            operators, layers = _middle_operators(meta, case, direction, tasks)
            rest_ns = (measured.p50_ns - total(table, device, operators).p50_ns) / layers
            points[direction].append(Point(size=case.size, p50_ns=round(rest_ns), spread=measured.spread))
    shape = (meta.model.hidden, meta.model.ffn_hidden)
    return [
        Curve(family="layer_overhead", direction=d, dtype=meta.model.dtype, shape=shape, points=tuple(points[d]))
        for d in directions
    ]


def _middle_operators(meta: Meta, case: Case, direction: Direction, tasks: list[Task]) -> tuple[list[Op], int]:
    """Operators of the subgraphs that a layer case times (all but the stage's ends), and how many overheads they hold."""
    task = next(t for t in tasks if t.task_id == case.task)
    layout = even_layout(meta.model, pp=1)
    context = StageContext(model=meta.model, layout=layout, stage=0, adapters=((task.task_id, task.peft),))
    assert direction != "weights"
    groups = subgraph_ops(context, layer_batch(task, case.size[0]), direction)
    operators = [op for index in middle_subgraphs(layout, direction) for op in groups[index]]
    layers = sum(op.family == "layer_overhead" for op in operators)
    return [op for op in operators if op.family != "layer_overhead"], layers
