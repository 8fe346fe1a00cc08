"""Plan: a decision, fully explicit: who shares which devices, in what units, in what order on every stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from muxtune.spec.align import ALIGNMENTS, Alignment, cut_packs
from muxtune.spec.cluster import Cluster
from muxtune.spec.estimate import Estimate
from muxtune.spec.layout import Layout
from muxtune.spec.noun import digest, noun
from muxtune.spec.task import Workload

PLAN_VERSION = 1

#: CTAs (thread blocks, one an SM) that a collective holds: enough for full overlap in the paper's setting (MuxTune §3.4.3).
COMM_CTAS = 8

OrderKey = tuple[int, int]
Sharing = Literal["sequence", "corun"]
Residency = Literal["resident", "swapped"]
AdapterFusion = Literal["htask", "bucket"]


@noun
class HTask:
    """Tasks batched along the batch dimension. `fuse_adapters` runs their adapters as one grouped operator.

    `chunk_tokens` is the chunk size of alignment `chunk` and 0 for all others.
    """

    tasks: tuple[str, ...]
    alignment: Alignment = "pad"
    fuse_adapters: bool = True
    chunk_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: an hTask has at least one task")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment={self.alignment!r}: known are {list(ALIGNMENTS)}")
        if (self.alignment == "chunk") != (self.chunk_tokens > 0) or self.chunk_tokens < 0:
            raise ValueError(
                f"chunk_tokens={self.chunk_tokens} with alignment={self.alignment!r}: give `chunk` a size of at least 1, "
                "all others 0"
            )


@noun
class Part:
    """Sample slots of one task's global batch that a unit computes, and the hTask (index in the instance) they ride in."""

    htask: int
    task: str
    slots: tuple[int, ...]


@noun
class Unit:
    """One micro-batch of every hTask of its bucket: what a stage runs forward or backward, whole or chunk by chunk.

    `chunks` is K, the most chunks that a pack of its hTasks has; hTasks that are not chunked ride in chunk 0.
    """

    parts: tuple[Part, ...]
    chunks: int = 1


@noun
class Launch:
    """One subgraph (index in `launched_subgraphs`) of one hTask on a stream."""

    htask: int
    subgraph: int
    stream: Literal["compute", "comm"]


@noun
class LaunchList:
    """The order inside a clock for one stage and direction of a bucket."""

    stage: int
    direction: Literal["forward", "backward"]
    launches: tuple[Launch, ...]


@noun
class Bucket:
    """hTasks (indices in the instance) interleaved inside one pipeline clock. No launch lists: one hTask after the other.

    `adapter_fusion: bucket` (hTasks of a single task each, §3.4.3) launches adapters as subgraphs of their own; those of one
    BaseOp whose launches are neighbours run as one grouped operator. `htask`: adapters stay in their hTask's subgraphs.
    """

    htasks: tuple[int, ...]
    units: tuple[Unit, ...]
    launches: tuple[LaunchList, ...] = ()
    adapter_fusion: AdapterFusion = "htask"


@noun
class Action:
    """One entry of a stage's order: the forward or backward of a unit (of its chunk), or the optimizer step of a task.

    `step` counts optimizer steps inside the Program (0 unless the order covers several).
    """

    op: Literal["forward", "backward", "step"]
    bucket: int = -1
    unit: int = -1
    task: str = ""
    step: int = 0
    chunk: int = 0


@noun
class StageOrder:
    """The explicit order of one stage."""

    stage: int
    actions: tuple[Action, ...]


@noun
class Instance:
    """A backbone on some devices and the hTasks it runs.

    `feed` is the order in which units (bucket, unit) enter the pipeline; empty means bucket after bucket. `order` turns the
    feed into stage orders (`1f1b`, `gpipe`: no cost needed) or is `explicit`, with `orders` for every stage. A task steps
    after its last backward unless an explicit order places its step. `steps` counts the optimizer steps that an explicit
    order covers. With dp replicas, unit u of every bucket is computed by replica u mod dp: each replica runs its own units in
    the order given here, and adapters' gradients are summed over the replicas before a step. `comm_ctas` are
    held by each running collective and slow the compute beside it (0: not at all).
    """

    name: str
    devices: tuple[int, ...]
    layout: Layout
    htasks: tuple[HTask, ...]
    buckets: tuple[Bucket, ...]
    microbatches: int
    order: Literal["1f1b", "gpipe", "explicit"] = "1f1b"
    feed: tuple[OrderKey, ...] = ()
    orders: tuple[StageOrder, ...] = ()
    steps: int = 1
    comm_ctas: int = COMM_CTAS

    def __post_init__(self) -> None:
        if self.comm_ctas < 0:
            raise ValueError(f"comm_ctas={self.comm_ctas}: must be at least 0")
        if (self.order == "explicit") != bool(self.orders):
            raise ValueError(
                f"order={self.order!r} with {len(self.orders)} stage orders: only `explicit` has them, one a stage"
            )
        if self.steps != 1 and self.order != "explicit":
            raise ValueError(f"steps={self.steps}: only an explicit order covers several optimizer steps")

    def on_replica(self, unit: int, replica: int) -> bool:
        """Whether a data-parallel replica computes the units of this number."""
        return unit % self.layout.dp == replica

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task ids in hTask order."""
        return tuple(t for h in self.htasks for t in h.tasks)


def unit_chunks(workload: Workload, htasks: Sequence[HTask], parts: Sequence[Part]) -> int:
    """K of a unit with these parts: the chunks of the longest pack of any of its hTasks, at least 1."""
    samples = Counter({(p.htask, p.task): 0 for p in parts})
    for part in parts:
        samples[part.htask, part.task] += len(part.slots)
    most = 1
    for (h, task_id), count in samples.items():
        htask = htasks[h]
        if htask.alignment == "chunk":
            longest = max(workload.task(t).billed_len_tokens for t in htask.tasks)
            lengths = [workload.task(task_id).billed_len_tokens] * count
            most = max(most, len(cut_packs(lengths, longest, htask.chunk_tokens)))
    return most


@noun
class SolverRecord:
    """What an exact or heuristic solver proved about its surrogate objective.

    `gap` is (value − bound) / value. `nodes` are branch-and-bound nodes, `columns` the candidate hTasks that were priced.
    `dp_value_ns` and `greedy_value_ns` are what the contiguous DP (exact charge) and greedy merging reach on the same
    objective. `simulated_ns` is the simulated iteration of the plan; `inversions` counts the pairs among this partition, the
    DP's and greedy's that the simulator ranks otherwise than the objective. `balance_gap` bounds how far the buckets are from
    the optimum of Eq. 7. None where not computed.
    """

    name: str
    status: str
    bound_ns: int | None = None
    gap: float | None = None
    value_ns: int | None = None
    evaluations: int = 0
    deterministic: bool = True
    nodes: int = 0
    columns: int = 0
    seed: int | None = None
    dp_value_ns: int | None = None
    greedy_value_ns: int | None = None
    simulated_ns: int | None = None
    inversions: int | None = None
    balance_gap: float | None = None


@noun
class LayoutSearch:
    """What a search over layouts and micro-batch counts looked at: none of it depends on clocks.

    `candidates` were planned and judged, `infeasible` of them in vain; `pruned_shape` were left out because a degree divides
    no dimension or leaves a replica without samples, `pruned_memory` because the backbone alone does not fit.
    """

    candidates: int
    infeasible: int
    pruned_shape: int
    pruned_memory: int
    evaluations: int


@noun
class Provenance:
    """The one block that digests leave out: wall-clock seconds, host, versions."""

    plan_seconds: float = 0.0
    created_utc: str = ""
    environment: str = ""


@noun
class MadeBy:
    """Which policy made the plan, with which config, on which cost model, and what its solver proved.

    `layouts` says what was searched where the layout was not given.
    """

    policy: str
    config: str = ""
    cost_model: str = ""
    solver: SolverRecord | None = None
    layouts: LayoutSearch | None = None


@noun
class Plan:
    """A versioned decision for a workload on a cluster.

    Instances that share devices run one after the other (`sharing: sequence`), each with its own resident backbone
    (`residency: resident`) or swapped in (`swapped`: one backbone at a time in memory, the swap itself not timed); or all
    at once (`corun`), every one on its own streams, resident. Instances on disjoint devices run in parallel.
    """

    version: int = PLAN_VERSION
    workload: Workload
    cluster: Cluster
    instances: tuple[Instance, ...]
    sharing: Sharing = "sequence"
    residency: Residency = "resident"
    made_by: MadeBy = MadeBy(policy="hand")
    predicted: Estimate | None = None
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        if self.version != PLAN_VERSION:
            raise ValueError(f"version={self.version}: this muxtune reads version {PLAN_VERSION}")

    def decision_digest(self) -> str:
        """Digest of what is executed: two policies that decide alike give one Program, whoever made the plan."""
        return digest((self.version, self.workload, self.cluster, self.instances, self.sharing, self.residency))
