"""Interleaving N equal tasks in one pipeline against a flush after each: N(S−1+C) / (S−1+CN) (MuxTune Fig. 19b)."""

from __future__ import annotations

from muxtune.experiments.recipes._ideal import equal_tasks, makespan_ns
from muxtune.experiments.recipes.base import Check, Recipe

STAGES = 4
#: (C, N) → the ideal gain, rounded as printed; the paper measured 1.24, 1.35, 1.36 at C=8 and up to 1.59 at C=4.
GAINS = {(8, 2): 1.16, (8, 4): 1.26, (8, 8): 1.31, (4, 2): 1.27, (4, 4): 1.47, (4, 8): 1.60}


class InterleavingGain(Recipe):
    """One backbone a task with a flush after each (`hf-peft`) against one pipeline for all (`temporal`)."""

    SOURCE = "MuxTune §5.3, Fig. 19b: up to 1.36x at C=8 and 1.59x at C=4, S=4"
    KIND = "derived"
    ASSUMES = (
        "forward as long as backward, messages free",
        "the number of tasks, which the paper's figure does not print",
    )

    def checks(self) -> tuple[Check, ...]:
        """One a pair of C and N."""
        found = []
        for (microbatches, tasks), gain in GAINS.items():
            work = equal_tasks(tasks, microbatches)
            times = [makespan_ns(policy, work, STAGES, microbatches) for policy in ("hf-peft", "temporal")]
            found.append(
                Check(
                    what=f"S={STAGES}, C={microbatches}, N={tasks}: gain",
                    expected=f"{gain:.2f}",
                    low=gain - 0.005,
                    high=gain + 0.005,
                    found=times[0] / times[1],
                )
            )
        return tuple(found)
