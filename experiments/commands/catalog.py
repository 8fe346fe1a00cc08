"""list: the plug-ins and presets that are here, each kind a table."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from muxtune.experiments.commands.costs import META, recorded
from muxtune.experiments.commands.inputs import COSTS
from muxtune.experiments.console import render, table
from muxtune.policies.base import policies
from muxtune.policies.cluster.base import cluster_policies
from muxtune.policies.objectives.base import objectives
from muxtune.profiler.store import Meta
from muxtune.sim.cost.base import cost_models
from muxtune.sim.cost.table import FittedTable
from muxtune.sim.traces.formats.base import trace_formats
from muxtune.sim.traces.generate import Arrivals
from muxtune.sim.traces.trace import GENERATED
from muxtune.spec.cluster import device_presets
from muxtune.spec.errors import UnknownKeyError
from muxtune.spec.files import read_noun
from muxtune.spec.lengths import embedded_lengths
from muxtune.spec.model import model_presets
from muxtune.spec.peft import peft_kinds
from muxtune.spec.units import GIB

Row = dict[str, Any]


def run(kind: str | None = None) -> dict[str, Any]:
    """Rows of one kind, or of all kinds.

    Raises:
        UnknownKeyError: there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise UnknownKeyError("kind", kind, KINDS)
    return {name: list(rows()) for name, rows in KINDS.items() if kind in (None, name)}


def show(body: dict[str, Any]) -> str:
    """A table a kind."""
    parts: list[Any] = []
    for kind, rows in body.items():
        cells = [[_cell(v) for v in row.values()] for row in rows]
        parts.append(table(list(rows[0]), cells, title=kind) if rows else f"{kind}: none")
    return render(*parts)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _about(found: Any) -> str:
    """First line of a class's docstring, else of its module's."""
    return (found.__doc__ or "").strip().split("\n")[0]


def _options(config: type[Any]) -> str:
    """`key=default` of each field."""
    fields = dataclasses.fields(config)
    return ",".join(f"{f.name}={str(f.default).lower() if isinstance(f.default, bool) else f.default}" for f in fields)


def _policies() -> Iterator[Row]:
    for name, found in policies().items():
        yield {"name": name, "options": _options(found.Config), "about": _about(found)}


def _cluster_policies() -> Iterator[Row]:
    for name, found in cluster_policies().items():
        yield {"name": name, "options": _options(found.Config), "about": _about(found)}


def _objectives() -> Iterator[Row]:
    for name, found in objectives().items():
        yield {"name": name, "unit": found.unit, "about": _about(found)}


def _models() -> Iterator[Row]:
    for name, m in model_presets().items():
        shapes = {f: getattr(m, f) for f in ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab")}
        yield {"name": name, "parameters": m.parameters, **shapes, "dtype": m.dtype}


def _devices() -> Iterator[Row]:
    for name, d in device_presets().items():
        yield {
            "name": name,
            "half_tflops": d.peak_flops_half / 1e12,
            "fp32_tflops": d.peak_flops_fp32 / 1e12,
            "memory_gib": d.memory_bytes / GIB,
            "bandwidth_gb_per_s": d.bandwidth_bytes_per_s / 1e9,
            "peak_w": d.peak_w,
        }


def _datasets() -> Iterator[Row]:
    for name, d in embedded_lengths().items():
        if "@" in name:
            continue
        table_tokens = d.quantiles_tokens
        lengths = {"median_tokens": table_tokens[50], "longest_tokens": table_tokens[100]}
        yield {
            "name": name,
            "tokenizer": d.tokenizer,
            "samples": d.samples,
            **lengths,
            "billed_len": d.covered_length(),
        }


def _cost_models() -> Iterator[Row]:
    for name, found in cost_models().items():
        yield {
            "name": name,
            "options": _options(found.Config),
            "calibrated": found.calibrated,
            "about": _about(found),
        }


def _peft() -> Iterator[Row]:
    for name, found in peft_kinds().items():
        options = [f for f in dataclasses.fields(found) if f.name != "kind"]
        yield {"name": name, "options": ",".join(f"{f.name}={f.default}" for f in options), "about": _about(found)}


def _traces() -> Iterator[Row]:
    yield {"name": GENERATED, "options": _options(Arrivals), "about": _about(Arrivals)}
    for name, found in trace_formats().items():
        yield {"name": name, "options": "", "about": _about(sys.modules[found.__module__])}


def _profiles() -> Iterator[Row]:
    """What each recorded profile covers: families, operator groups, token range of its linears, mean held-out error."""
    for folder in recorded():
        fitted = read_noun(FittedTable, folder / COSTS)
        tokens = [p.size[0] for c in fitted.curves if c.family == "linear" for p in c.points]
        errors = [f.held_out_mape for f in fitted.families if f.held_out_mape is not None]
        yield {
            "name": folder.name,
            "device": fitted.device,
            "model": read_noun(Meta, folder / META).model.name if (folder / META).is_file() else "-",
            "families": len(fitted.families),
            "groups": len(fitted.curves),
            "points": sum(len(c.points) for c in fitted.curves),
            "tokens": f"{min(tokens)}..{max(tokens)}" if tokens else "-",
            "held_out_mape": sum(errors) / len(errors) if errors else "-",
            "folder": str(folder),
            "environment": fitted.provenance.environment,
        }


KINDS: dict[str, Callable[[], Iterator[Row]]] = {
    "policies": _policies,
    "cluster-policies": _cluster_policies,
    "objectives": _objectives,
    "models": _models,
    "devices": _devices,
    "datasets": _datasets,
    "traces": _traces,
    "cost-models": _cost_models,
    "peft": _peft,
    "profiles": _profiles,
}
