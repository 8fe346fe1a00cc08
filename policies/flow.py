"""The schedule problem of MuxTune's Appendix A: a re-entrant flow shop of units that go down the stages and up again.

Forwards pass every stage in one order and backwards in one order (channels are FIFO); a stage runs one thing at a time, and
what its units hold from forward to backward stays within its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from muxtune.spec.noun import noun

Way = Literal["forward", "backward"]
#: What a stage runs, in order: (way, job).
Sequences = tuple[tuple[tuple[Way, int], ...], ...]


@noun
class Job:
    """One unit: what it takes and holds on each stage. Jobs that are equal in all are interchangeable."""

    kind: int
    forward_ns: tuple[int, ...]
    backward_ns: tuple[int, ...]
    held_bytes: tuple[int, ...]


def makespan_ns(jobs: Sequence[Job], sequences: Sequences) -> int | None:
    """End of the last backward if every stage starts each item as early as its order allows; None if they deadlock."""
    stages = len(sequences)
    ended: dict[tuple[Way, int, int], int] = {}
    done, free = [0] * stages, [0] * stages
    moved = True
    while moved:
        moved = False
        for s, sequence in enumerate(sequences):
            while done[s] < len(sequence):
                way, u = sequence[done[s]]
                ready = _ready_ns(ended, way, u, s, stages)
                if ready is None:
                    break
                took = (jobs[u].forward_ns if way == "forward" else jobs[u].backward_ns)[s]
                free[s] = ended[way, u, s] = max(free[s], ready) + took
                done[s] += 1
                moved = True
    whole = all(n == len(sequence) for n, sequence in zip(done, sequences, strict=True))
    return max(free) if whole else None


def _ready_ns(ended: dict[tuple[Way, int, int], int], way: Way, u: int, s: int, stages: int) -> int | None:
    """When the input of an item is there; None if that is not known yet."""
    if way == "forward":
        return ended.get(("forward", u, s - 1)) if s else 0
    return ended.get(("backward", u, s + 1)) if s + 1 < stages else ended.get(("forward", u, s))


def fits(jobs: Sequence[Job], sequences: Sequences, budget_bytes: Sequence[int]) -> bool:
    """Whether every stage stays within its bytes; a job alone always may."""
    for s, sequence in enumerate(sequences):
        held: dict[int, int] = {}
        for way, u in sequence:
            if way == "backward":
                del held[u]
                continue
            held[u] = jobs[u].held_bytes[s]
            if len(held) > 1 and sum(held.values()) > budget_bytes[s]:
                return False
    return True


def least_ns(jobs: Sequence[Job]) -> int:
    """Below every schedule: a stage's work, the least way to it before and the least way back after."""
    stages = range(len(jobs[0].forward_ns))
    return max(
        sum(j.forward_ns[s] + j.backward_ns[s] for j in jobs)
        + min(sum(j.forward_ns[:s]) for j in jobs)
        + min(sum(j.backward_ns[:s]) for j in jobs)
        for s in stages
    )
