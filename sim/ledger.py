"""Ledger: adds up costs with their errors, extrapolated time and energy."""

from __future__ import annotations

from muxtune.sim.cost.base import Cost, CostSum


class Ledger:
    """Adds up costs. Errors within a family share a cause and add linearly; joules and extrapolated time just add."""

    def __init__(self) -> None:
        self.p50_ns = self.host_ns = self.extrapolated_ns = 0
        self.joules = 0.0
        self.error_ns: dict[str, float] = {}

    def add(self, family: str, price: Cost, times: int = 1) -> None:
        """One operator, called so many times."""
        self.p50_ns += times * price.p50_ns
        self.host_ns += times * price.host_ns
        self.extrapolated_ns += times * price.p50_ns if price.extrapolated else 0
        self.joules += times * price.joules
        error_ns = times * (price.relative_error * (price.p50_ns + price.host_ns))
        self.error_ns[family] = self.error_ns.get(family, 0.0) + error_ns

    def add_sum(self, costs: CostSum, times: int = 1) -> None:
        """A sum of operators, so many times."""
        self.p50_ns += times * costs.p50_ns
        self.host_ns += times * costs.host_ns
        self.extrapolated_ns += times * costs.extrapolated_ns
        self.joules += times * costs.joules
        for family, error_ns in costs.error_ns:
            self.error_ns[family] = self.error_ns.get(family, 0.0) + times * error_ns

    def sum(self) -> CostSum:
        """What was added so far."""
        return CostSum(
            p50_ns=self.p50_ns,
            host_ns=self.host_ns,
            extrapolated_ns=self.extrapolated_ns,
            joules=self.joules,
            error_ns=tuple(sorted(self.error_ns.items())),
        )
