"""Learning-rate schedules: with η the task's rate, w warm-up steps, T steps in all and f the final share,

η_t = η·(t+1)/w for t < w, then with u = (t−w)/max(1, T−w−1): constant η, linear η·(1−(1−f)·u), cosine η·(f+(1−f)·(1+cos πu)/2).
"""

from __future__ import annotations

import math
from typing import Literal

from muxtune.spec.noun import noun


@noun
class Schedule:
    """How a task's learning rate moves over its steps. `final_share` is the last step's share of the full rate."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_share: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must not be negative")
        if not 0.0 <= self.final_share <= 1.0:
            raise ValueError(f"final_share={self.final_share}: must be in [0, 1]")
        if self.kind == "constant" and self.final_share:
            raise ValueError(
                f"final_share={self.final_share} with kind=constant: leave it out, or take linear or cosine"
            )


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`; a step that was skipped counts. Later steps keep the last rate."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps - 1))
    falling = 1.0 - progress if schedule.kind == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.final_share + (1.0 - schedule.final_share) * falling)
