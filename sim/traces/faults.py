"""A failure trace: CSV with at_s, lasts_s, devices (`3`, `4-7` or `1 5 9`) and slowdown (empty: the devices fail)."""

from __future__ import annotations

import csv
from pathlib import Path

from muxtune.spec.errors import InputError
from muxtune.spec.fleet import Fault
from muxtune.spec.units import seconds_to_ns

COLUMNS = ("at_s", "lasts_s", "devices", "slowdown")


def read_faults(path: Path) -> tuple[Fault, ...]:
    """The faults of a file, in order of time.

    Raises:
        InputError: no such file, a missing column, or a bad row by file, line and value.
    """
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines)
        missing = [name for name in COLUMNS[:3] if name not in (rows.fieldnames or ())]
        if missing:
            raise InputError(f"{path}: line 1: column {missing[0]} is missing: the columns are {', '.join(COLUMNS)}")
        found = [_fault(row, f"{path}: line {number}") for number, row in enumerate(rows, start=2)]
    return tuple(sorted(found, key=lambda f: f.at_ns))


def _fault(row: dict[str, str | None], place: str) -> Fault:
    try:
        slowdown = (row.get("slowdown") or "").strip()
        return Fault(
            at_ns=seconds_to_ns(float(row["at_s"] or "")),
            lasts_ns=seconds_to_ns(float(row["lasts_s"] or "")),
            devices=_devices((row["devices"] or "").strip()),
            slowdown=float(slowdown) if slowdown else None,
        )
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{place}: {error}: give seconds, devices as 3, 4-7 or 1 5 9, slowdown empty or >= 1"
        ) from error


def _devices(text: str) -> tuple[int, ...]:
    devices: list[int] = []
    for piece in text.split():
        first, dash, last = piece.partition("-")
        devices += range(int(first), int(last) + 1) if dash else [int(first)]
    return tuple(devices)
