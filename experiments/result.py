"""StudyResult: what `demo` and `validate` found; reports draw it, `--json` prints it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from muxtune.profiler.provenance import Birth
from muxtune.sim.cost.table import FamilyError
from muxtune.spec.metrics import CauseError
from muxtune.spec.noun import noun, plain
from muxtune.spec.timeline import Timeline


@noun
class PlanRow:
    """One plan, predicted and measured. Times of the measurement are medians of ratios to the reference GEMM, back in ns.

    `error` is predicted / measured − 1. `noise` is the relative difference of the medians of odd and even rounds: no
    prediction can be better. Rates count over the measured iteration; bubble is shown for both timelines.
    """

    workload: str
    layout: str
    policy: str
    plan_digest: str
    program_digest: str
    predicted_ns: int
    measured_ns: int
    error: float
    noise: float
    relative_error: float
    extrapolated_fraction: float
    rounds: int
    billed_tokens_per_s: float
    processed_tokens_per_s: float
    predicted_billed_tokens_per_s: float
    predicted_peak_bytes: tuple[int, ...]
    measured_peak_bytes: tuple[int, ...]
    predicted_bubble: float
    measured_bubble: float
    plan_seconds: float
    causes: tuple[CauseError, ...]
    operators: tuple[CauseError, ...] = ()


@noun
class Shrunk:
    """The smallest Program found that still shows the worst plan's error: fewer tasks, fewer samples, the same decisions.

    `steps` are the smaller plans that were measured on the way, `kept` those that showed the error.
    """

    workload: str
    layout: str
    policy: str
    samples: tuple[tuple[str, int], ...]
    predicted_ns: int
    measured_ns: int
    error: float
    noise: float
    steps: int
    kept: int
    operators: tuple[CauseError, ...]


@noun
class Repeat:
    """One plan measured twice beside the others: the relative difference of its two medians."""

    workload: str
    layout: str
    policy: str
    difference: float


@noun
class Ranking:
    """Policies of one workload and layout ranked by prediction and by measurement.

    `kendall_tau` is τ-b over all plans; `resolved_tau` over pairs that differ by more than noise and propagated error;
    `unresolved` is the share of the other pairs. `winner` is the policy with the least measured time.
    """

    workload: str
    layout: str
    kendall_tau: float | None
    resolved_tau: float | None
    unresolved: float
    predicted_winner: str
    winner: str
    speedup_over: tuple[tuple[str, float], ...]


@noun
class StudyResult:
    """A finished (or, if `complete` is false, cut off) study."""

    device: str
    complete: bool
    rows: tuple[PlanRow, ...]
    rankings: tuple[Ranking, ...]
    families: tuple[FamilyError, ...]
    fitted_on: str
    held_out: str
    reference_ns: int
    provenance: Birth
    seconds: float
    shrunk: Shrunk | None = None
    repeats: tuple[Repeat, ...] = ()

    @property
    def mape(self) -> float | None:
        """Mean absolute error over plans; plans with equal digests count once."""
        once = {row.plan_digest: abs(row.error) for row in self.rows}
        return sum(once.values()) / len(once) if once else None

    @property
    def worst(self) -> PlanRow | None:
        """The row with the largest absolute error."""
        return max(self.rows, key=lambda r: abs(r.error), default=None)

    @property
    def noise(self) -> float | None:
        """Median noise of the rows."""
        ordered = sorted(r.noise for r in self.rows)
        return ordered[len(ordered) // 2] if ordered else None

    @property
    def repeatability(self) -> float | None:
        """Median difference of a plan measured twice: no prediction can be better."""
        ordered = sorted(r.difference for r in self.repeats)
        return ordered[len(ordered) // 2] if ordered else None

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints (DESIGN §11: device, rows, mape, worst, kendall_tau, fitted_on, held_out)."""
        taus = [r.kendall_tau for r in self.rankings if r.kendall_tau is not None]
        body: dict[str, Any] = plain(self)
        body |= {
            "mape": self.mape,
            "noise": self.noise,
            "repeatability": self.repeatability,
            "worst": plain(self.worst),
            "kendall_tau": sum(taus) / len(taus) if taus else None,
        }
        return body


@noun
class Pair:
    """Both timelines of one plan, for the pictures and the trace.

    `predicted` is at the speed that the machine had while operators were profiled; `scale` brings it to the speed of the
    measured rounds (reference GEMM then / reference GEMM while profiling).
    """

    workload: str
    layout: str
    policy: str
    predicted: Timeline
    measured: Timeline
    scale: float = 1.0

    @property
    def predicted_at_speed(self) -> Timeline:
        """The prediction at the machine's speed of the measured rounds."""
        spans = tuple(
            replace(s, start_ns=round(s.start_ns * self.scale), end_ns=round(s.end_ns * self.scale))
            for s in self.predicted.spans
        )
        memory = tuple(replace(m, time_ns=round(m.time_ns * self.scale)) for m in self.predicted.memory)
        return replace(self.predicted, spans=spans, memory=memory)
