"""Inside a clock: the order in which a bucket's subgraphs are launched (MuxTune Algorithm 1) and the time it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from muxtune.policies.stage_latency import DIRECTIONS, Direction, Node
from muxtune.policies.surrogate import Surrogate
from muxtune.spec.plan import Launch, LaunchList

Chain = tuple[Node, ...]


def algorithm_1(chains: Sequence[Chain]) -> tuple[tuple[int, int], ...]:
    """(chain, depth) of each node in launch order: shallow first, then longest, ties to the earlier chain.

    The subgraphs of an hTask form a chain, so the paper's queue of nodes without predecessors empties level by level.
    """
    nodes = [(depth, -node.compute_ns, c) for c, chain in enumerate(chains) for depth, node in enumerate(chain)]
    return tuple((c, depth) for depth, _, c in sorted(nodes))


def clock_ns(chains: Sequence[Chain], order: Sequence[tuple[int, int]]) -> int:
    """Time of a clock: compute and collectives on a FIFO stream each, a chain's next node after its last collective."""
    compute_free_ns = comm_free_ns = 0
    ready_ns = [0] * len(chains)
    for c, depth in order:
        node = chains[c][depth]
        ready_ns[c] = compute_free_ns = max(compute_free_ns, ready_ns[c]) + node.compute_ns
        if node.collective:
            ready_ns[c] = comm_free_ns = max(comm_free_ns, ready_ns[c]) + node.comm_ns
    return max(ready_ns)


def launch_lists(
    surrogate: Surrogate, htasks: Sequence[int], groups: Sequence[tuple[str, ...]]
) -> Iterator[LaunchList]:
    """Launch lists of a bucket on every stage, both directions; `groups` are the tasks of its hTasks."""
    for stage in range(surrogate.stages):
        for direction in DIRECTIONS:
            chains = [surrogate.latency.chain(stage, surrogate.shape(tasks), direction) for tasks in groups]
            launches: list[Launch] = []
            launched = [0] * len(chains)
            for c, depth in algorithm_1(chains):
                for stream in ("compute", "comm") if chains[c][depth].collective else ("compute",):
                    launches.append(Launch(htask=htasks[c], subgraph=launched[c], stream=stream))  # type: ignore[arg-type]
                    launched[c] += 1
            yield LaunchList(stage=stage, direction=direction, launches=tuple(launches))


def unit_ns(
    surrogate: Surrogate,
    groups: Sequence[tuple[str, ...]],
    index: int,
    stage: int,
    direction: Direction,
    chunk: int = 0,
) -> int:
    """Time of (a chunk of) micro-batch `index` of some hTasks, all with samples in it, in one clock.

    Launches are ordered by the largest micro-batch (its first chunk). Without collectives, or on a CPU, where they take
    the compute's place, nothing overlaps.
    """
    if len(groups) == 1 or not surrogate.overlaps:
        return sum(surrogate.direction_ns(tasks, index, stage, direction, chunk) for tasks in groups)
    largest = [surrogate.latency.chain(stage, surrogate.shape(tasks), direction) for tasks in groups]
    shapes = (surrogate.shape(tasks, index, chunk=chunk) for tasks in groups)
    chains = [surrogate.latency.chain(stage, shape, direction) for shape in shapes]
    return clock_ns(chains, algorithm_1(largest))
