"""1F1B with N equal hTasks of stage time t on S stages, C micro-batches each, takes exactly 2(S−1)t + 2CNt."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from muxtune.experiments.recipes._ideal import TOKEN_NS, equal_tasks, makespan_ns
from muxtune.experiments.recipes.base import Check, Recipe


class PipelineFormula(Recipe):
    """Simulated time over the formula's, on ideal hardware."""

    SOURCE = "Eq. 4 with the exact charge of an extra hTask (DESIGN §4)"
    KIND = "law"
    ASSUMES = ("forward as long as backward, messages free",)

    def checks(self) -> tuple[Check, ...]:
        """One a combination of S, C and N."""
        return tuple(self._checks())

    def _checks(self) -> Iterator[Check]:
        for stages, microbatches, tasks in product((1, 2, 4), (4, 8), (1, 3, 8)):
            layers = 4 // stages
            t_ns = 64 * layers * TOKEN_NS
            formula_ns = 2 * (stages - 1) * t_ns + 2 * microbatches * tasks * t_ns
            found_ns = makespan_ns("temporal", equal_tasks(tasks, microbatches), stages, microbatches)
            yield Check(
                what=f"S={stages}, C={microbatches}, N={tasks}: simulated / formula",
                expected="exactly 1",
                low=1.0,
                high=1.0,
                found=found_ns / formula_ns,
            )
