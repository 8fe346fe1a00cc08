"""Inside a clock: launch lists of a bucket by the rules of spec/clock.py, and the time of its clocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from muxtune.policies.microbatch import UnitCost
from muxtune.policies.stage_latency import DIRECTIONS, Direction
from muxtune.policies.surrogate import Surrogate
from muxtune.spec.clock import clock_ns, launch_order
from muxtune.spec.plan import Launch, LaunchList


def launch_lists(
    surrogate: Surrogate, htasks: Sequence[int], groups: Sequence[tuple[str, ...]]
) -> Iterator[LaunchList]:
    """Launch lists of a bucket on every stage, both directions; `groups` are the tasks of its hTasks."""
    for stage in range(surrogate.stages):
        for direction in DIRECTIONS:
            isolated = surrogate.isolates(groups)
            chains = [surrogate.latency.chain(stage, surrogate.shape(tasks), direction, isolated) for tasks in groups]
            launches: list[Launch] = []
            launched = [0] * len(chains)
            for c, depth in launch_order(chains, surrogate.rule):
                for stream in ("compute", "comm") if chains[c][depth].collective else ("compute",):
                    launches.append(_launch(htasks[c], launched[c], stream))
                    launched[c] += 1
            yield LaunchList(stage=stage, direction=direction, launches=tuple(launches))


@lru_cache(maxsize=1 << 16)
def _launch(htask: int, subgraph: int, stream: str) -> Launch:
    """The same launches occur in every list: one object each."""
    return Launch(htask=htask, subgraph=subgraph, stream=stream)  # type: ignore[arg-type]


def unit_cost(surrogate: Surrogate, groups: Sequence[tuple[str, ...]], index: int, chunk: int = 0) -> UnitCost:
    """(A chunk of) micro-batch `index` of some hTasks, all with samples in it; units of equal micro-batches are priced once."""
    costs = [x for x in (surrogate.microbatch(tasks, index, chunk) for tasks in groups) if x is not None]
    # The surrogate keeps micro-batches as long as it lives, so that an identity stands for one.
    key = (surrogate.isolates(groups), *map(id, costs), *(id(surrogate.microbatch(tasks)) for tasks in groups))
    if key not in surrogate.units:
        stages = range(surrogate.stages)
        clocks_ns = [[unit_ns(surrogate, groups, index, s, way, chunk) for s in stages] for way in DIRECTIONS]
        surrogate.units[key] = UnitCost(
            held_bytes=tuple(sum(x.held_bytes[s] for x in costs) for s in stages),
            transient_bytes=tuple(surrogate.transient_bytes(costs, s) for s in stages),
            forward_ns=tuple(clocks_ns[0]),
            backward_ns=tuple(clocks_ns[1]),
        )
    return surrogate.units[key]


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
    isolated = surrogate.isolates(groups)
    if not isolated and (len(groups) == 1 or not surrogate.overlaps):
        return sum(surrogate.direction_ns(tasks, index, stage, direction, chunk) for tasks in groups)
    largest = [surrogate.latency.chain(stage, surrogate.shape(tasks), direction, isolated) for tasks in groups]
    shapes = (surrogate.shape(tasks, index, chunk=chunk) for tasks in groups)
    chains = [surrogate.latency.chain(stage, shape, direction, isolated) for shape in shapes]
    return clock_ns(chains, launch_order(largest, surrogate.rule))
