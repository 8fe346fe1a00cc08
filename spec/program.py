"""Program: Plan + Draw as instruction lists, one a rank. Simulator and executor interpret the same Program."""

from __future__ import annotations

from typing import Literal

from muxtune.spec.align import Batch
from muxtune.spec.noun import digest, noun
from muxtune.spec.plan import Launch, Plan

OpName = Literal["recv", "forward", "send", "backward", "step"]


@noun
class UnitKey:
    """Which unit of work: optimizer step within the Program, instance, bucket, unit, chunk (0 where it is not cut)."""

    step: int
    instance: int
    bucket: int
    unit: int
    chunk: int = 0


@noun
class Instruction:
    """One entry of a rank's list.

    recv and send name a `peer` rank, a unique `tag`, the `size_bytes` of the message, and whether it is an `activation` or a
    `gradient`; forward and backward name a unit; step names a `task`. Fields that do not apply are None.
    """

    op: OpName
    key: UnitKey
    task: str | None = None
    peer: int | None = None
    tag: int | None = None
    payload: Literal["activation", "gradient"] | None = None
    size_bytes: int = 0


@noun
class UnitWork:
    """The batches of a unit (of one chunk of it), one an hTask of its bucket; hTasks without rows in it are left out."""

    key: UnitKey
    batches: tuple[Batch, ...]

    @property
    def tokens(self) -> int:
        """Processed tokens of the unit."""
        return sum(b.tokens for b in self.batches)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks with rows in the unit."""
        return tuple(task for b in self.batches for task, _, _ in b.segments())


@noun
class StageLaunches:
    """Launch order of one instance, bucket, stage and direction, always explicit."""

    instance: int
    bucket: int
    stage: int
    direction: Literal["forward", "backward"]
    launches: tuple[Launch, ...]


@noun
class RankProgram:
    """Instructions of one device, in order."""

    rank: int
    instructions: tuple[Instruction, ...]


@noun
class Program:
    """All that a run needs besides weights: instructions per rank, the units' batches, the launch lists."""

    plan_digest: str
    seed: int
    steps: int
    ranks: tuple[RankProgram, ...]
    units: tuple[UnitWork, ...]
    launches: tuple[StageLaunches, ...]

    def digest(self) -> str:
        """Stands in the predicted and in the measured Timeline."""
        return digest(self)


@noun
class Bound:
    """A Plan with one of its Programs: what simulator and executor are handed."""

    plan: Plan
    program: Program
