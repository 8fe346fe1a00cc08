"""Search over thresholds on W: for W in (low, high] a partition costs at least low + 1 + Σ steady of warm-ups ≤ high.

Intervals are taken by lowest bound first. A wide one is halved; in a narrow one the columns of reduced cost up to a reach t are
solved as an integer program: what is better than that uses a column beyond t, and costs t more than the linear bound.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from muxtune.policies.diving import dive
from muxtune.policies.floors import NEVER
from muxtune.policies.master import LEVEL_COLUMNS, Dual, Master
from muxtune.policies.vectors import MOST_COLUMNS
from muxtune.spec.noun import noun

#: An interval narrower than this part of what is open is solved, not halved; the first reach is this part of it.
NARROW, FIRST_REACH = 4, 16
#: What is open must have shrunk to this before all columns that matter are asked for again.
RETRY = 0.7
#: Linear programs on the way down to lower W, and the best of them that are rounded.
DESCENT, STARTS = 16, 2
#: Most distinct warm-ups that an integer program decides on at once.
MOST_LEVELS = 60


@noun
class Interval:
    """W is above `low_ns` and at most `high_ns`.

    `rest_ns` is below Σ steady of every partition in it; `dual` was found for warm-ups up to at least `high_ns`. Columns
    were too many when `tried_ns` was open, and up to the reach `most_ns`.
    """

    low_ns: int
    high_ns: int
    dual: Dual
    rest_ns: int
    tried_ns: int = NEVER
    most_ns: int = NEVER

    @property
    def bound_ns(self) -> int:
        """Below every partition of the interval."""
        return self.low_ns + 1 + self.rest_ns


def close(master: Master) -> int:
    """Improve the best partition of `master` and return a bound: equal to its value if, and only if, it is proven optimal."""
    low_ns = max(0, master.pricer.least_warmup_ns()) - 1
    heap = [(x.bound_ns, x.low_ns, x) for x in _descend(master, low_ns)]
    heapq.heapify(heap)
    stuck: list[int] = []
    for _ in range(master.limits.steps):
        if not heap or heap[0][0] >= master.value_ns or master.late:
            break
        _, _, interval = heapq.heappop(heap)
        parts = _advance(master, interval)
        if parts is None:
            stuck.append(interval.bound_ns)
        for part in parts or ():
            heapq.heappush(heap, (part.bound_ns, part.low_ns, part))
    return min([master.value_ns, *stuck, *(bound for bound, _, _ in heap)])


def _descend(master: Master, low_ns: int) -> list[Interval]:
    """Intervals that cover every W that can pay, from step to step of the linear bound; good partitions on the way."""
    everything = master.linear(master.value_ns, master.value_ns)
    found: list[Interval] = []
    at_ns = master.value_ns - 1 - everything.bound_ns
    while at_ns > low_ns:
        dual = master.linear(at_ns, master.value_ns)
        below_ns = low_ns
        if len(found) + 1 < DESCENT and dual.bound_ns < master.value_ns:
            below_ns = max(low_ns, min(dual.used_ns - 1, at_ns * 3 // 4))
        found.append(Interval(low_ns=below_ns, high_ns=at_ns, dual=dual, rest_ns=dual.bound_ns))
        at_ns = below_ns
    for interval in sorted(found, key=lambda x: (x.dual.used_ns + x.rest_ns, x.low_ns))[:STARTS]:
        dive(master, interval.dual.used_ns)
        master.improve(interval.dual, interval.dual.used_ns)
    return found


def _advance(master: Master, interval: Interval) -> list[Interval] | None:
    """The interval with a higher bound, or its halves; none where nothing in it can be better; None at the limits."""
    high_ns = min(interval.high_ns, master.value_ns - 1 - interval.rest_ns)
    if high_ns <= interval.low_ns:
        return []
    interval = replace(interval, high_ns=high_ns)
    if high_ns < interval.dual.used_ns:
        dual = master.linear(high_ns, master.value_ns - interval.low_ns - 1)
        return [replace(interval, dual=dual, rest_ns=max(interval.rest_ns, dual.bound_ns), most_ns=NEVER)]
    width_ns, open_ns = high_ns - interval.low_ns - 1, master.value_ns - interval.bound_ns
    if master.has_nodes:
        if open_ns < interval.tried_ns * RETRY:
            whole = _whole(master, interval)
            if whole is not None:
                return whole
            interval = replace(interval, tried_ns=open_ns)
        if width_ns <= open_ns // NARROW:
            risen = _solve(master, interval)
            if risen is not None:
                return risen
    return _halves(interval) if width_ns > open_ns // FIRST_REACH else None


def _whole(master: Master, interval: Interval) -> list[Interval] | None:
    """Solve an interval over every column that matters, W included; None if they are too many, or it is not proven."""
    base_ns, most_ns = interval.low_ns + 1, master.value_ns
    most = MOST_COLUMNS if master.few_vectors else LEVEL_COLUMNS
    columns = master.mattering(interval.dual, base_ns, interval.high_ns, most_ns, most)
    if columns is None:
        return None
    if not master.few_vectors and len({c.warmup_ns for c in columns if c.warmup_ns > base_ns}) > MOST_LEVELS:
        return None
    proven_ns = master.solve(columns, interval.dual, base_ns, levels=True)
    return [] if proven_ns is not None and proven_ns >= master.value_ns else None


def _halves(interval: Interval) -> list[Interval]:
    """Cut at the middle, or well above it where the linear optimum needs no higher W: its bound holds up to there."""
    low_ns, high_ns = interval.low_ns, interval.high_ns
    middle_ns = (low_ns + high_ns) // 2
    if middle_ns < interval.dual.used_ns - 1 < high_ns - (high_ns - low_ns) // 8:
        middle_ns = interval.dual.used_ns - 1
    return [replace(interval, high_ns=middle_ns), replace(interval, low_ns=middle_ns)]


def _solve(master: Master, interval: Interval) -> list[Interval] | None:
    """Take more columns into account: all that matter if they are not too many."""
    base_ns, dual = interval.low_ns + 1, interval.dual
    whole_ns = master.value_ns - 1 - base_ns - dual.bound_ns
    known_ns = interval.rest_ns - dual.bound_ns
    reach_ns = min(whole_ns, max(2 * known_ns, (master.value_ns - interval.bound_ns) // FIRST_REACH), interval.most_ns)
    columns = None
    while columns is None and reach_ns > known_ns:
        columns = master.mattering(dual, base_ns, interval.high_ns, reach_ns, master.limits.columns)
        if columns is None:
            reach_ns = (reach_ns + max(0, known_ns)) // 2
            interval = replace(interval, most_ns=reach_ns)
    proven_ns = None if columns is None else master.solve(columns, dual, base_ns, levels=False)
    if proven_ns is None:
        return None
    if reach_ns < whole_ns:
        proven_ns = min(proven_ns, base_ns + dual.bound_ns + reach_ns + 1)
    risen = replace(interval, rest_ns=max(interval.rest_ns, proven_ns - base_ns))
    if reach_ns == whole_ns and interval.high_ns > base_ns:
        return _halves(risen)
    return [risen] if risen.rest_ns > interval.rest_ns else None
