"""Estimate: what is predicted (or was measured) about one Program, in the keys that every report uses."""

from __future__ import annotations

from muxtune.spec.noun import noun


@noun
class TaskStep:
    """Time of one optimizer step of a task; `slowdown` is `period_ns` against running alone on the same devices, where known.

    `period_ns` is the time from one of its steps to the next: the iteration of the instances that share its devices (others
    do not wait for it). `end_ns` is when its step ends, counted from the start of its iteration. None: a file from before
    the field.
    """

    task: str
    step_ns: int
    slowdown: float | None = None
    period_ns: int | None = None
    end_ns: int | None = None


@noun
class Share:
    """A cause of spec/stalls.py and its share of device-time."""

    cause: str
    fraction: float


@noun
class Estimate:
    """One Program's figures. Rates count over `iteration_ns` = Program time / optimizer steps.

    `spread` is the relative standard deviation of iteration_ns over draws; token counts are per iteration, averaged over
    the draws. Fractions are of device-time (ranks × Program time), except
    `extrapolated_fraction` (of predicted time). `relative_error` is propagated from the cost model.

    `utilisation` is the share in which a rank computes (forward, backward, step); `stalls` adds up to 1 and has it in
    its parts. `mfu` is useful flops (spec/flops.py) at raw lengths over the peak of the backbone's dtype: padding is not
    useful. `mfu_billed` counts billed lengths (the paper's effective tokens), and may pass 1 where less than these is
    computed. `corun_slowed_fraction` is the time that instances that run at once on a device take from each other (of lists
    that overlap it may pass 1), `corun_default_fraction` the part of it that rests on the cost model's stated default and not
    on measured pairs. `energy_j` = idle + dynamic energy of one iteration on the ranks that the plan uses; links take none. None:
    not known (no energy figures, or a plan file from before the field).
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
    utilisation: float | None = None
    mfu: float | None = None
    mfu_billed: float | None = None
    stalls: tuple[Share, ...] = ()
    energy_idle_j: float | None = None
    energy_dynamic_j: float | None = None
    corun_slowed_fraction: float | None = None
    corun_default_fraction: float | None = None

    @property
    def joules_per_billed_token(self) -> float | None:
        """Energy of one iteration over its billed tokens."""
        return None if self.energy_j is None or not self.billed_tokens else self.energy_j / self.billed_tokens

    def rate_per_s(self, tokens: int) -> float:
        """Tokens per second at this iteration time."""
        return tokens * 1e9 / self.iteration_ns


def formula_estimate(
    cost_model: str,
    iteration_ns: int,
    tokens: int,
    *,
    energy_j: float | None = None,
    utilisation: float | None = None,
    peak_bytes: tuple[int, ...] = (),
) -> Estimate:
    """What a formula, and no simulator, says of a Program: nothing is padded, idle or uncertain."""
    return Estimate(
        iteration_ns=iteration_ns,
        spread=0.0,
        draws=1,
        per_task=(),
        peak_bytes=peak_bytes,
        raw_tokens=tokens,
        billed_tokens=tokens,
        processed_tokens=tokens,
        truncated_tokens=0,
        bubble_fraction=0.0,
        exposed_comm_fraction=0.0,
        host_bound_fraction=0.0,
        extrapolated_fraction=0.0,
        relative_error=0.0,
        energy_j=energy_j,
        cost_model=cost_model,
        calibrated=False,
        utilisation=utilisation,
    )
