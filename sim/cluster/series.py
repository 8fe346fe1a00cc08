"""Amounts over time in a bounded number of equal buckets: when the last one is full, pairs are merged and buckets double."""

from __future__ import annotations

from collections.abc import Sequence

#: Buckets at most; a merge leaves half of them.
BUCKETS = 512
FIRST_NS = 1_000_000_000


class Series:
    """Several named amounts that share one time axis. An amount over an interval is spread evenly over it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.width_ns = FIRST_NS
        self.amounts: dict[str, list[float]] = {name: [0.0] * BUCKETS for name in names}

    def add(self, name: str, start_ns: int, end_ns: int, amount: float) -> None:
        """Add an amount that accrued evenly from start to end."""
        while end_ns > self.width_ns * BUCKETS:
            self._merge()
        width_ns, row = self.width_ns, self.amounts[name]
        first, last = start_ns // width_ns, (end_ns - 1) // width_ns
        if first == last:
            row[first] += amount
            return
        rate = amount / (end_ns - start_ns)
        row[first] += rate * ((first + 1) * width_ns - start_ns)
        whole = rate * width_ns
        for bucket in range(first + 1, last):
            row[bucket] += whole
        row[last] += rate * (end_ns - last * width_ns)

    def _merge(self) -> None:
        for name, row in self.amounts.items():
            self.amounts[name] = [a + b for a, b in zip(row[::2], row[1::2], strict=True)] + [0.0] * (BUCKETS // 2)
        self.width_ns *= 2

    def until(self, end_ns: int) -> dict[str, list[float]]:
        """The buckets up to a time, as amounts a nanosecond; the last one counts only as far as it goes."""
        count = max(1, -(-end_ns // self.width_ns))
        found: dict[str, list[float]] = {}
        for name, row in self.amounts.items():
            widths = [min(self.width_ns, end_ns - i * self.width_ns) or 1 for i in range(count)]
            found[name] = [value / width for value, width in zip(row, widths, strict=False)]
        return found
