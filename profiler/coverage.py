"""Does a fitted profile have a figure for every operator of a workload under some layouts? What is missing is named."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.profiler.cases import EMPTY, EMPTY_LORA, PASSAGE, Case, message_sizes, needed_cases, shared_cases
from muxtune.sim.cost.table import Curve, FittedTable
from muxtune.spec.layout import Layout
from muxtune.spec.task import Workload

#: Cases that are measured for fitting only: no operator of a plan has their family.
UNPRICED = (PASSAGE, EMPTY, EMPTY_LORA)


def missing(fitted: FittedTable, workload: Workload, layouts: Sequence[Layout]) -> tuple[str, ...]:
    """One sentence an operator group that was not measured, or not over the range of sizes that any grouping can meet.

    Empty: every plan is priced without extrapolation, chunks of powers of two included.
    """
    curves = {c.group: c for c in fitted.curves}
    grids: dict[tuple[str, str, str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for case in (*needed_cases([workload], layouts), *shared_cases([workload], layouts)):
        if case.family not in UNPRICED:
            grids.setdefault((case.family, _direction(case), case.dtype, case.shape), []).append(case.size)
    said = [text for group, sizes in grids.items() if (text := _lack(curves.get(group), group, sizes))]  # type: ignore[call-overload]
    if any(x.pp > 1 for x in layouts):
        sizes = [(n,) for n in message_sizes([workload])]
        said += [
            text
            for family in ("send", "p2p", "recv")
            if (text := _lack(curves.get((family, "forward", "bytes", ())), (family, "forward", "bytes", ()), sizes))
        ]
    for ranks in sorted({x.tp * x.pp for x in layouts if x.tp * x.pp > 1}):
        if ("all_reduce", "forward", "bytes", (ranks,)) not in curves:
            said.append(f"the meeting of {ranks} ranks")
    return tuple(said)


def _direction(case: Case) -> str:
    return "weights" if case.direction == "weights" else "forward"


def _lack(
    curve: Curve | None, group: tuple[str, str, str, tuple[int, ...]], sizes: Sequence[tuple[int, ...]]
) -> str | None:
    name = f"{group[0]} {group[1]} {group[2]} {'x'.join(map(str, group[3]))}".strip()
    if curve is None:
        return name
    for axis, asked in enumerate(zip(*sizes, strict=True)):
        measured = [p.size[axis] for p in curve.points]
        if min(asked) < min(measured) or max(asked) > max(measured):
            return f"{name} of {min(asked)}..{max(asked)} (measured {min(measured)}..{max(measured)})"
    return None
