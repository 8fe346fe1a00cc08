"""Instances that run at once on one device: how much longer an instruction takes beside others.

An instruction's neighbour is looked at in MOMENTS evenly spaced moments of its own time, in each of which one of its operators
runs, or none (a wait for the host or a link). Beside neighbours all along an instruction takes
duration + Σ_op mean over the moments of (latency(op, what runs then) − latency(op)).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from muxtune.sim.cost.base import CostModel
from muxtune.sim.stage import Site, Way, clock_calls
from muxtune.spec.align import Batch
from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.noun import noun
from muxtune.spec.ops import COLLECTIVES, Op
from muxtune.spec.plan import Launch

MOMENTS = 8


@noun
class Load:
    """What an instruction asks of its device: its time alone, its operators with their times, and what its neighbours see.

    Equal operators count as one. `seen` has the operator that runs in each moment, None where the device idles; a collective
    is seen as a `collective_load`.
    """

    duration_ns: int
    calls: tuple[tuple[Op, int], ...]
    seen: tuple[Op | None, ...]


@noun
class Slowed:
    """Time of an instruction beside others; `default_ns` of what they add rest on a stated default, `error_ns` is unsure."""

    duration_ns: int
    default_ns: int = 0
    error_ns: int = 0


def make_load(duration_ns: int, calls: Sequence[tuple[Op, int]], load: tuple[Op, ...] = ()) -> Load:
    """Of calls in the order in which they run; `load` is what a running collective takes from its neighbours."""
    merged: dict[Op, int] = {}
    for op, ns in calls:
        merged[op] = merged.get(op, 0) + ns
    return Load(duration_ns=duration_ns, calls=tuple(merged.items()), seen=tuple(_seen(duration_ns, calls, load)))


def _seen(duration_ns: int, calls: Sequence[tuple[Op, int]], load: tuple[Op, ...]) -> Iterator[Op | None]:
    """The operators run one after the other from the start on; the device idles in the rest."""
    ends_ns = list(accumulate(ns for _, ns in calls))
    for moment in range(MOMENTS):
        place = bisect_right(ends_ns, (2 * moment + 1) * duration_ns // (2 * MOMENTS))
        now = calls[place][0] if place < len(calls) else None
        collective = now is not None and now.family in COLLECTIVES
        yield now if not collective else load[0] if load else None


def clock_load(
    cost: CostModel, site: Site, duration_ns: int, batches: Sequence[Batch], way: Way, launches: Sequence[Launch]
) -> Load:
    """The load of a forward or backward that takes `duration_ns` alone."""
    return make_load(duration_ns, list(clock_calls(cost, site, batches, way, launches)), site.load)


class Beside:
    """Slowdowns on one kind of device; every set of neighbours is priced once."""

    def __init__(self, cost: CostModel, device: DeviceSpec) -> None:
        self.cost, self.device = cost, device
        self.known: dict[tuple[int, ...], Slowed] = {}
        self.prices: dict[tuple[Op, tuple[Op, ...]], tuple[int, bool, float]] = {}

    def slowed(self, load: Load, others: tuple[Load, ...]) -> Slowed:
        """Time of an instruction beside others all along; alone, its own. The loads must outlive this object."""
        beside = sorted(others, key=lambda x: x.duration_ns)
        key = (id(load), *map(id, beside))
        if key not in self.known:
            self.known[key] = self._slowed(load, beside)
        return self.known[key]

    def _slowed(self, load: Load, others: Sequence[Load]) -> Slowed:
        if self.device.is_cpu:  # a core runs them in turn
            more_ns = load.duration_ns * len(others)
            return Slowed(duration_ns=load.duration_ns + more_ns, default_ns=more_ns)
        added_ns = default_ns = 0
        error_ns = 0.0
        for moment in range(MOMENTS):
            # Neighbours meet each other in different moments: an odd factor visits each moment once.
            seen = [x.seen[moment * (2 * n + 1) % MOMENTS] for n, x in enumerate(others)]
            share = tuple(x for x in seen if x is not None)
            for op, ns in load.calls if share else ():
                more_ns, default, error = self._more_ns(op, ns, share)
                added_ns += more_ns
                default_ns += more_ns * default
                error_ns += more_ns * error
        whole_ns = load.duration_ns - (-added_ns // MOMENTS)
        return Slowed(duration_ns=whole_ns, default_ns=default_ns // MOMENTS, error_ns=round(error_ns / MOMENTS))

    def _more_ns(self, op: Op, ns: int, share: tuple[Op, ...]) -> tuple[int, bool, float]:
        """(what `share` adds to so much of an operator, whether by a default, its relative error)."""
        if op.family in COLLECTIVES:
            # Collectives that run at once share their links evenly; compute does not slow them (DESIGN §4).
            return ns * sum(x.family == "collective_load" for x in share), True, 0.0
        if (op, share) not in self.prices:
            alone, beside = self.cost.latency(op, self.device), self.cost.latency(op, self.device, share)
            added_ns = max(0, beside.p50_ns - alone.p50_ns)
            millionths = added_ns * 1_000_000 // alone.p50_ns if alone.p50_ns else 0
            default = not self.cost.calibrated or (beside.extrapolated and not alone.extrapolated)
            self.prices[op, share] = (millionths, default, beside.relative_error)
        millionths, default, error = self.prices[op, share]
        return ns * millionths // 1_000_000, default, error
