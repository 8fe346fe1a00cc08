"""Timeline: spans of what ran when on every rank, written alike by simulator and executor."""

from __future__ import annotations

from typing import Literal

from muxtune.spec.noun import noun
from muxtune.spec.plan import Provenance
from muxtune.spec.program import Instruction, UnitKey

Stream = Literal["compute", "comm", "host", "p2p"]


@noun
class Span:
    """One instruction (or, inside it, one launched subgraph: `subgraph` ≥ 0) on one stream of one rank.

    `index` is the instruction's place in the rank's list. Times are relative to the start of the Program. `tag` is the
    message of a send or recv, the same at both ends. `host_wait_ns` of a subgraph's time is known to be waiting for kernels
    that the host has not issued.
    """

    rank: int
    stream: Stream
    op: str
    index: int
    key: UnitKey
    tasks: tuple[str, ...]
    start_ns: int
    end_ns: int
    subgraph: int = -1
    tag: int | None = None
    host_wait_ns: int = 0

    @property
    def duration_ns(self) -> int:
        """end − start."""
        return self.end_ns - self.start_ns


@noun
class MemorySample:
    """Bytes in use on a rank from `time_ns` on."""

    rank: int
    time_ns: int
    in_use_bytes: int


@noun
class PowerSample:
    """Watts that a rank draws from `time_ns` on: idle, and the operators of the instruction that runs, spread over it."""

    rank: int
    time_ns: int
    watts: float


@noun
class Timeline:
    """What a Program did, predicted (`sim`) or measured (`executor`).

    `power` is empty where there are no energy figures. `peak_bytes` has one entry a rank, in rank order; None where the
    run did not measure memory.
    """

    source: Literal["sim", "executor"]
    program_digest: str
    seed: int
    steps: int
    spans: tuple[Span, ...]
    memory: tuple[MemorySample, ...] = ()
    power: tuple[PowerSample, ...] = ()
    peak_bytes: tuple[int, ...] | None = None
    provenance: Provenance = Provenance()

    @property
    def makespan_ns(self) -> int:
        """From the first start to the last end."""
        return max(s.end_ns for s in self.spans) - min(s.start_ns for s in self.spans)

    @property
    def iteration_ns(self) -> int:
        """Program time over optimizer steps."""
        return round(self.makespan_ns / self.steps)

    def instruction_spans(self, rank: int) -> tuple[Span, ...]:
        """Spans of whole instructions of a rank, in instruction order."""
        return tuple(sorted((s for s in self.spans if s.rank == rank and s.subgraph < 0), key=lambda s: s.index))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that have spans."""
        return tuple(sorted({s.rank for s in self.spans}))


def span_op(instruction: Instruction) -> str:
    """The span name of an instruction: forward, backward, step, recv_activation, send_gradient."""
    return f"{instruction.op}_{instruction.payload}" if instruction.payload else instruction.op
