"""What a worker group and its workers say to each other: plain frozen data, pickled over a local socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from muxtune.executor.checkpoint import Checkpoint
from muxtune.executor.data import Pair
from muxtune.executor.reports import Array, Mark, StepReport
from muxtune.spec.program import Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Where a worker stands: its rank, the world, the device, the core it is pinned to (−1: not pinned)."""

    rank: int
    ranks: int
    device: Literal["cpu", "cuda"]
    rendezvous: str
    core: int
    timeout_s: float
    deterministic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What plans that are loaded later are fed with.

    `backbone` is a Hugging Face folder to read weights from (None: random ones), `texts` the samples of data sets by name:
    (prompt, response) token ids; other data sets are seeded noise.
    """

    backbone: Path | None = None
    texts: Mapping[str, Sequence[Pair]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Build backbones and adapters for a plan and the tensors of its Program under a name.

    `ending`: tasks end at their `steps`; without it they go on, as measurements want them.
    """

    name: str
    bound: Bound
    seed: int
    random_adapters: bool = False
    ending: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """Give a loaded plan another plan: tasks that it lacks leave, new ones join, all others and the backbones stay.

    New tasks in `saved` go on from there.
    """

    name: str
    bound: Bound
    seed: int
    saved: Mapping[str, Checkpoint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebind:
    """Give a loaded plan another Program (other samples); adapters and optimizers go on."""

    name: str
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Write the state of some tasks into a folder, a file a task and rank; None: of all, and the rank's generators."""

    name: str
    folder: Path
    tasks: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Put every task of a loaded plan, and the rank's generators, back to where a checkpoint left them."""

    name: str
    checkpoint: Checkpoint
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Run a loaded Program once; `memory` counts allocations, `reference` times the reference GEMM before and after."""

    name: str
    memory: bool = False
    reference: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """One rank's part of a run: marks by the monotonic clock, the steps that were taken, the reference GEMM around it.

    Bytes if they were counted: `static_bytes` were there before; `kinds` are (backbones, adapters, optimizer states) after.
    """

    rank: int
    marks: tuple[Mark, ...]
    reference_ns: int
    cpu_ns: int
    wall_ns: int
    static_bytes: int | None = None
    peak_bytes: int | None = None
    kinds: tuple[int, int, int] | None = None
    steps: tuple[StepReport, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """A task's history on one rank: loss and gradient norm of each step so far, steps skipped as not finite."""

    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Ask for every task's report; `state` adds its parameters and optimizer states, `backbone` digests of the weights."""

    name: str
    state: bool = False
    backbone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Reports and (if asked for) parameters and optimizer states of one rank, by task; a digest for each backbone."""

    reports: dict[str, TaskReport]
    state: dict[str, dict[str, Array]] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Array]] = field(default_factory=dict)
    backbones: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Run a loaded Program without its optimizer steps and return each task's gradients; parameters do not move."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Poison:
    """Set one task's adapter parameters to NaN (to show that its neighbours do not notice)."""

    name: str
    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Call `module:function(worker, *arguments)` in every worker (the profiler measures this way)."""

    function: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Forget a plan."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A worker's exception: one line for the user, the traceback for the log."""

    message: str
    details: str
    input_error: bool = False
