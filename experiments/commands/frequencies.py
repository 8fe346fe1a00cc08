"""Frequency steps as a what-if: the same plan predicted at other core clocks (spec/frequency.py states what is assumed)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muxtune.experiments.console import table
from muxtune.sim.cost._frequency import AtFrequency
from muxtune.sim.cost.base import CostModel
from muxtune.sim.simulate import estimate
from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.errors import InputError
from muxtune.spec.estimate import Estimate
from muxtune.spec.frequency import FrequencyStep, frequency_step
from muxtune.spec.plan import Plan
from muxtune.spec.units import NS_PER_S, format_ns


def parse_frequencies(text: str, device: DeviceSpec) -> tuple[FrequencyStep, ...]:
    """Steps of `all` or `MHZ,MHZ,…`; none for an empty text.

    Raises:
        InputError: not a number, or not a step of the device.
    """
    if not text:
        return ()
    if text == "all":
        return tuple(frequency_step(device, mhz) for mhz in device.frequency_mhz)
    pieces = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() for p in pieces):
        raise InputError(f"--frequencies {text}: expected `all` or MHz separated by commas")
    return tuple(frequency_step(device, int(p)) for p in dict.fromkeys(pieces))


def frequency_body(step: FrequencyStep) -> dict[str, Any]:
    """What a result says about the clock that it was predicted at."""
    return {
        "mhz": step.mhz,
        "reference_mhz": step.reference_mhz,
        "dynamic_power_exponent": step.exponent,
        "what_if": True,
        "assumption": step.statement,
    }


def frequency_rows(
    plan: Plan, cost: CostModel, steps: Sequence[FrequencyStep], seed: int, draws: int
) -> list[dict[str, Any]]:
    """Time, mean power of all the plan's devices, and energy of one iteration at each step."""
    return [_row(step, estimate(plan, AtFrequency(cost, step), seed, draws)) for step in steps]


def _row(step: FrequencyStep, found: Estimate) -> dict[str, Any]:
    return {
        **frequency_body(step),
        "iteration_ns": found.iteration_ns,
        "billed_tokens_per_s": found.rate_per_s(found.billed_tokens),
        "power_w": None if found.energy_j is None else found.energy_j * NS_PER_S / found.iteration_ns,
        "energy_j": found.energy_j,
        "energy_idle_j": found.energy_idle_j,
        "energy_dynamic_j": found.energy_dynamic_j,
        "joules_per_billed_token": found.joules_per_billed_token,
    }


def frequency_table(rows: Sequence[dict[str, Any]]) -> Any:
    """One line a step."""
    names = ["MHz", "iteration", "billed tok/s", "power W", "idle J", "dynamic J", "J/billed tok"]
    return table(names, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    return [
        str(row["mhz"]),
        format_ns(row["iteration_ns"]),
        f"{row['billed_tokens_per_s']:,.0f}",
        shown("power_w", ",.0f"),
        shown("energy_idle_j", ",.1f"),
        shown("energy_dynamic_j", ",.1f"),
        shown("joules_per_billed_token", ".3g"),
    ]
