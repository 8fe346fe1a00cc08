"""Acceptance targets of the GPU suite: computed from its results, each met, missed or not measurable here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from muxtune.experiments.gpu_head_to_head import REAL

#: Billed tokens/s of the best muxtune variant over each baseline.
SPEEDUPS = {REAL: 3.0, "Megatron one at a time": 1.5, "batch-all": 1.5}
#: Memory of as many separate backbones over that of the shared one.
SAVINGS = {"fused in one pass": 5.0, "interleaved": 10.0}

Rows = Sequence[Mapping[str, Any]]


def judge(results: Mapping[str, Mapping[str, Any]], on_gpu: bool) -> list[dict[str, Any]]:
    """A line for each target: what, figure (None where nothing was measured), target, state and why."""
    head, memory = results.get("head to head", {}), results.get("memory", {})
    found = [_speedup(head.get("rows", ()), baseline, target, on_gpu) for baseline, target in SPEEDUPS.items()]
    return found + [_saving(memory, way, target, on_gpu) for way, target in SAVINGS.items()]


def _speedup(rows: Rows, baseline: str, target: float, on_gpu: bool) -> dict[str, Any]:
    rates = {r["way"]: r["billed_tokens_per_s"] for r in rows if r.get("billed_tokens_per_s")}
    ours = {way: rate for way, rate in rates.items() if way.startswith("muxtune")}
    what = f"billed tokens/s of muxtune over {baseline}"
    if not ours or baseline not in rates:
        missing = baseline if baseline not in rates else "muxtune"
        return _line(what, None, target, on_gpu, _reason(rows, missing))
    best = max(ours, key=lambda way: (ours[way], way))
    return _line(what, ours[best] / rates[baseline], target, on_gpu, f"best: {best}")


def _saving(memory: Mapping[str, Any], way: str, target: float, on_gpu: bool) -> dict[str, Any]:
    rows = memory.get("rows", ())
    peaks = {r["way"]: r["peak_bytes"] for r in rows if r.get("peak_bytes")}
    tasks = memory.get("tasks", 0)
    what = f"memory of {tasks or 'many'} tasks apart over {way}"
    if "one task" not in peaks or way not in peaks:
        return _line(what, None, target, on_gpu, _reason(rows, way if "one task" in peaks else "one task"))
    return _line(what, tasks * peaks["one task"] / peaks[way], target, on_gpu, "the peak of one task is Megatron's")


def _reason(rows: Rows, way: str) -> str:
    return next((f"{way}: {r['reason']}" for r in rows if r["way"] == way and r.get("reason")), f"{way}: no figure")


def _line(what: str, figure: float | None, target: float, on_gpu: bool, why: str) -> dict[str, Any]:
    state = "met" if figure is not None and figure >= target else "missed"
    if figure is None or not on_gpu:
        state = "not measurable here"
    return {"what": what, "figure": figure, "target": target, "state": state, "why": why}


def spoken(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence a target."""
    return [
        f"- {t['what']}: {'-' if t['figure'] is None else format(t['figure'], '.2f')} (at least {t['target']:g}): "
        f"{t['state']} ({t['why']})"
        for t in targets
    ]
