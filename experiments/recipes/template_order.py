"""The paper's template (buckets largest first, a bucket's micro-batches consecutive, eager) against round-robin buckets."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from muxtune.experiments.recipes.base import Check, Recipe
from muxtune.spec.order import eager
from muxtune.spec.plan import OrderKey

STAGES, MICROBATCHES, BUCKETS, DRAWS = 4, 4, 5, 20


class TemplateOrder(Recipe):
    """Mean ratio of makespans over drawn bucket latencies, both orders scheduled backward-first by the same rule."""

    SOURCE = "MuxTune §3.4.1: 1.17x, the order it is compared with is not stated"
    KIND = "derived"
    ASSUMES = (
        f"S={STAGES}, C={MICROBATCHES}, {BUCKETS} buckets of stage time 20 to 100, {DRAWS} seeded draws",
        "forward as long as backward, messages free",
    )

    def checks(self) -> tuple[Check, ...]:
        """At the 1F1B cap of S−s units in flight, and without a cap."""
        capped = [self._ratio(seed, [STAGES - s for s in range(STAGES)]) for seed in range(DRAWS)]
        free = [self._ratio(seed, [BUCKETS * MICROBATCHES] * STAGES) for seed in range(DRAWS)]
        return (
            Check(
                what="round-robin / template, at most S−s units in flight",
                expected="about 1.2",
                low=1.15,
                high=1.3,
                found=statistics.fmean(capped),
            ),
            Check(
                what="round-robin / template, equal eager memory",
                expected="about 1.02",
                low=1.0,
                high=1.05,
                found=statistics.fmean(free),
            ),
        )

    def _ratio(self, seed: int, budget: Sequence[int]) -> float:
        draw = random.Random(seed)
        latency_ns = sorted((draw.randint(20, 100) for _ in range(BUCKETS)), reverse=True)
        template = [(b, u) for b in range(BUCKETS) for u in range(MICROBATCHES)]
        round_robin = [(b, u) for u in range(MICROBATCHES) for b in range(BUCKETS)]
        times = [_makespan_ns(feed, latency_ns, budget) for feed in (round_robin, template)]
        return times[0] / times[1]


def _makespan_ns(feed: Sequence[OrderKey], latency_ns: Sequence[int], budget: Sequence[int]) -> int:
    """A unit counts one byte, so that a budget is a number of units in flight."""
    return eager(feed, STAGES, lambda _, key, __: latency_ns[key[0]], lambda _, __: 1, budget).makespan_ns
