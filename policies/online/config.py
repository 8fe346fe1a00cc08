"""ReplanConfig: how far a re-plan may go, and what it must pay for."""

from __future__ import annotations

from muxtune.spec.noun import noun
from muxtune.spec.units import NS_PER_S


@noun
class ReplanConfig:
    """`replan_cost_ns` is charged once for a change that nobody's arrival or departure forces.

    `horizon_ns` is the time over which the change has to pay (an hour is a choice, not a measurement). `moves` bounds the
    improving moves, `groups` the candidate hTasks that are priced for them. `full` asks the policy for a new plan instead,
    with no memory of the one in force.
    """

    replan_cost_ns: int = 0
    horizon_ns: int = 3600 * NS_PER_S
    moves: int = 16
    groups: int = 64
    full: bool = False

    def __post_init__(self) -> None:
        if self.replan_cost_ns < 0 or self.horizon_ns <= 0:
            raise ValueError(
                f"replan_cost_ns={self.replan_cost_ns}, horizon_ns={self.horizon_ns}: at least 0, and above 0"
            )
        if self.moves < 0 or self.groups < 0:
            raise ValueError(f"moves={self.moves}, groups={self.groups}: must be at least 0")
