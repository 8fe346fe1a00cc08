"""Estimate: what is predicted (or was measured) about one Program, in the keys that every report uses."""

from __future__ import annotations

from muxtune.spec.noun import noun


@noun
class TaskStep:
    """Time of one optimizer step of a task; `slowdown` is against running alone on the same devices, where known."""

    task: str
    step_ns: int
    slowdown: float | None = None


@noun
class Estimate:
    """One Program's figures. Rates count over `iteration_ns` = Program time / optimizer steps.

    `spread` is the relative standard deviation of iteration_ns over draws; token counts are per iteration, averaged over
    the draws. Fractions are of device-time (ranks × Program time), except
    `extrapolated_fraction` (of predicted time). `relative_error` is propagated from the cost model.
    """

    iteration_ns: int
    spread: float
    draws: int
    per_task: tuple[TaskStep, ...]
    peak_bytes: tuple[int, ...]
    raw_tokens: int
    billed_tokens: int
    processed_tokens: int
    truncated_tokens: int
    bubble_fraction: float
    exposed_comm_fraction: float
    host_bound_fraction: float
    extrapolated_fraction: float
    relative_error: float
    energy_j: float | None
    cost_model: str
    calibrated: bool

    def rate_per_s(self, tokens: int) -> float:
        """Tokens per second at this iteration time."""
        return tokens * 1e9 / self.iteration_ns
