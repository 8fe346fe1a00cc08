"""What commands read and where they write: plans, layouts, cost models, output places."""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from muxtune.sim.cost.base import CostModel, WrapBase, cost_models, require_cost_model
from muxtune.sim.cost.interference import CoRunGrid, Interference
from muxtune.sim.cost.table import FittedTable, Table
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.files import read_noun, require_writable
from muxtune.spec.plan import Plan, Provenance
from muxtune.spec.registry import parse_config, split_reference

#: Told (label, done, total).
Progress = Callable[[str, int, int], None]

COSTS = "costs.json"


def silent(label: str, done: int, total: int) -> None:
    """A Progress that says nothing."""


def read_plan(path: Path) -> Plan:
    """A Plan file.

    Raises:
        InputError: no such file, or no Plan of this version.
    """
    return read_noun(Plan, path)


def load_cost(reference: str, cluster: Cluster, allow_extrapolation: bool = False) -> CostModel:
    """A cost model `NAME` or `NAME:key=value,…`, or a fitted table: its file, profile folder, or folder of `profiles`.

    Raises:
        UnknownKeyError: neither a cost model nor a file or folder, or no such option. InputError: a profile of another device.
    """
    name, options = split_reference(reference)
    if name in cost_models():
        made = require_cost_model(name)
        if issubclass(made, Table):
            raise InputError(f"--cost {reference}: needs a profile: give the folder that `muxtune profile --out` wrote")
        return _named(made, parse_config("cost model", name, made.Config, options), cluster, allow_extrapolation)
    path = _costs_file(reference)
    return Table(read_noun(FittedTable, path), cluster.device, allow_extrapolation)


def _named(made: type[Any], config: Any, cluster: Cluster, allow_extrapolation: bool) -> CostModel:
    """A cost model of this class, with the base and the co-run grid that its config names."""
    parts: dict[str, Any] = {}
    if issubclass(made, WrapBase):
        parts["base"] = load_cost(config.base, cluster, allow_extrapolation)
    if issubclass(made, Interference) and config.grid:
        parts["grid"] = read_noun(CoRunGrid, Path(config.grid))
    model: CostModel = made(config, **parts)
    return model


def _costs_file(reference: str) -> Path:
    path = Path(reference)
    if path.is_file():
        return path
    for folder in (path, *(root / reference for root in profile_roots())):
        if (folder / COSTS).is_file():
            return folder / COSTS
    if path.is_dir():
        raise InputError(f"--cost {reference}: holds no {COSTS}: run `muxtune profile --out {reference}`, it resumes")
    names = [*cost_models(), *(p.name for root in profile_roots() for p in root.iterdir() if (p / COSTS).is_file())]
    raise UnknownKeyError("cost model, profile folder or file", reference, names)


def profile_roots() -> tuple[Path, ...]:
    """Folders of recorded profiles: `profiles` here and beside the installed source."""
    roots = (Path("profiles"), Path(__file__).resolve().parents[2] / "profiles")
    return tuple({root.resolve(): root for root in roots if root.is_dir()})


def output_folder(path: Path, option: str = "--out") -> Path:
    """The folder, made if it is not there.

    Raises:
        InputError: something that is no folder is in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: not a directory, and none can be made: {error.strerror}") from error
    return path


def output_file(path: Path, option: str = "--out") -> Path:
    """The path of a file to write, its folder made if it is not there.

    Raises:
        InputError: the path is a folder, a device, a pipe or a link, or its parent is no folder.
    """
    if path.is_dir():
        raise InputError(f"{option} {path}: is a directory: give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: {path.parent} is not a directory: {error.strerror}") from error
    try:
        return require_writable(path)
    except InputError as error:
        raise InputError(f"{option} {error}") from error


def provenance(plan_seconds: float) -> Provenance:
    """When, where and how long a plan was made."""
    environment = f"muxtune {version('muxtune')}, Python {platform.python_version()}, {platform.system()}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Provenance(plan_seconds=plan_seconds, created_utc=created, environment=f"{environment} {platform.machine()}")
