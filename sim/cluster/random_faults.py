"""Random faults: devices and nodes fail, devices straggle, each after exponential times of a given mean (MTBF)."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence

from muxtune.spec.cluster import Cluster
from muxtune.spec.fleet import Fault
from muxtune.spec.noun import noun
from muxtune.spec.units import NS_PER_S, seconds_to_ns

HOUR_NS = 3600 * NS_PER_S


@noun
class FaultRates:
    """Mean hours between faults of one device or node; 0: none. Repairs and slow spells have exponential lengths of this mean."""

    gpu_mtbf_h: float = 0.0
    node_mtbf_h: float = 0.0
    repair_h: float = 1.0
    straggler_mtbf_h: float = 0.0
    straggler_h: float = 1.0
    slowdown: float = 1.5

    def __post_init__(self) -> None:
        for name in ("gpu_mtbf_h", "node_mtbf_h", "straggler_mtbf_h"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not self.repair_h > 0 or not self.straggler_h > 0 or self.slowdown < 1:
            raise ValueError(
                f"repair_h={self.repair_h}, straggler_h={self.straggler_h}, slowdown={self.slowdown}: "
                "hours above 0, slowdown at least 1"
            )


def random_faults(clusters: Sequence[Cluster], rates: FaultRates, seed: int) -> Iterator[Fault]:
    """Faults without end, in order of time; equal arguments give equal faults."""
    nodes: list[tuple[int, ...]] = []
    first = 0
    for cluster in clusters:
        for node in cluster.nodes:
            nodes.append(tuple(range(first, first + node.gpus)))
            first += node.gpus
    devices = [(d,) for d in range(first)]
    kinds = (
        ("gpu", devices, rates.gpu_mtbf_h, rates.repair_h, None),
        ("node", nodes, rates.node_mtbf_h, rates.repair_h, None),
        ("straggler", devices, rates.straggler_mtbf_h, rates.straggler_h, rates.slowdown),
    )
    streams = [
        _stream(random.Random(f"{seed} {name}"), units, mtbf_h, lasts_h, slowdown)
        for name, units, mtbf_h, lasts_h, slowdown in kinds
        if mtbf_h > 0
    ]
    return heapq.merge(*streams, key=lambda f: f.at_ns)


def _stream(
    chance: random.Random, units: Sequence[tuple[int, ...]], mtbf_h: float, lasts_h: float, slowdown: float | None
) -> Iterator[Fault]:
    """Poisson, the rate of one unit times their number; which unit is even chance."""
    now_ns = 0
    while True:
        now_ns += seconds_to_ns(chance.expovariate(len(units) / (3600 * mtbf_h)))
        lasts_ns = max(1, round(chance.expovariate(1.0) * lasts_h * HOUR_NS))
        yield Fault(at_ns=now_ns, lasts_ns=lasts_ns, devices=units[chance.randrange(len(units))], slowdown=slowdown)
