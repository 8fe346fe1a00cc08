"""Program: Plan + Draw as instruction lists, one a rank. Simulator and executor interpret the same Program."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, starmap
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


def instruction_text(x: Instruction) -> str:
    """For people: `recv gradient of bucket 0 unit 3 chunk 1`, `step of task a`."""
    if x.op == "step":
        return f"step of task {x.task}"
    chunk = f" chunk {x.key.chunk}" if x.key.chunk else ""
    return f"{x.op} {x.payload + ' ' if x.payload else ''}of bucket {x.key.bucket} unit {x.key.unit}{chunk}"


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


def list_places(starts: Sequence[int], instructions: int) -> tuple[range, ...]:
    """Places in each of the lists of a rank that begin at `starts`."""
    return tuple(starmap(range, pairwise((*starts, instructions))))


@noun
class RankProgram:
    """Instructions of one device: one list, or, where instances run at once, the list of each of them, one behind the other.

    `starts` has the place of each list's first instruction. A list runs in order; lists run at once.
    """

    rank: int
    instructions: tuple[Instruction, ...]
    starts: tuple[int, ...] = (0,)

    @property
    def lists(self) -> tuple[range, ...]:
        """Places of the instructions of each list."""
        return list_places(self.starts, len(self.instructions))


@noun
class Program:
    """All that a run needs besides weights: instructions per rank, the units' batches, the launch lists."""

    plan_digest: str
    seed: int
    steps: int
    ranks: tuple[RankProgram, ...]
    units: tuple[UnitWork, ...]
    launches: tuple[StageLaunches, ...]

    @property
    def at_once(self) -> bool:
        """Whether some device runs several lists at once; each instance then has channels of its own."""
        return any(len(listing.starts) > 1 for listing in self.ranks)

    def digest(self) -> str:
        """Stands in the predicted and in the measured Timeline."""
        return digest(self)


#: A FIFO of messages: (source rank, target rank, payload, instance; −1 where instances share it).
ChannelKey = tuple[int, int, str, int]


def channel_of(rank: int, x: Instruction, at_once: bool) -> ChannelKey:
    """The channel of a rank's send or recv; `at_once`: instances that run at once do not share theirs."""
    assert x.peer is not None
    source, target = (rank, x.peer) if x.op == "send" else (x.peer, rank)
    return source, target, str(x.payload), x.key.instance if at_once else -1


@noun
class Bound:
    """A Plan with one of its Programs: what simulator and executor are handed."""

    plan: Plan
    program: Program
