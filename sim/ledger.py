"""Ledger: adds up costs with their errors, extrapolated time and energy."""

from __future__ import annotations

from muxtune.sim.cost.base import Cost, CostSum


class Ledger:
    """Adds up costs. Errors within a family share a cause and add linearly; joules and extrapolated time just add."""

    def __init__(self) -> None:
        self.p50_ns = self.host_ns = self.extrapolated_ns = 0
        self.joules = 0.0
        self.error_ns: dict[str, float] = {}

    def add(self, family: str, price: Cost) -> None:
        """One operator."""
        self.p50_ns += price.p50_ns
        self.host_ns += price.host_ns
        self.extrapolated_ns += price.p50_ns if price.extrapolated else 0
        self.joules += price.joules
        self.error_ns[family] = self.error_ns.get(family, 0.0) + price.relative_error * (price.p50_ns + price.host_ns)

    def add_sum(self, costs: CostSum) -> None:
        """A sum of operators."""
        self.p50_ns += costs.p50_ns
        self.host_ns += costs.host_ns
        self.extrapolated_ns += costs.extrapolated_ns
        self.joules += costs.joules
        for family, error_ns in costs.error_ns:
            self.error_ns[family] = self.error_ns.get(family, 0.0) + error_ns

    def sum(self) -> CostSum:
        """What was added so far."""
        return CostSum(
            p50_ns=self.p50_ns,
            host_ns=self.host_ns,
            extrapolated_ns=self.extrapolated_ns,
            joules=self.joules,
            error_ns=tuple(sorted(self.error_ns.items())),
        )
