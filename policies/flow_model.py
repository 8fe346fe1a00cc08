"""The integer program of policies/flow.py: start times and who goes first (Appendix A speaks of S·Σn_i constraints, no formula).

min T with for every stage: f_u + F_u ≤ f_v or f_v + F_v ≤ f_u (x_uv, one for all stages), the same for backwards (y_uv), and
between forward u and backward v (z_suv = 1: v's backward stands first); held_u + Σ_v held_v·(x_vu − z_suv) ≤ budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from muxtune.policies.flow import Job, Sequences

#: What adds variables and constraints: policies/solver.py has the library.
Term = Any


class FlowModel:
    """Rows of the program over times counted in units of `grain_ns`, rounded down: its optimum is below the true one."""

    def __init__(self, jobs: Sequence[Job], budget_bytes: Sequence[int], most_ns: int, grain_ns: int) -> None:
        self.jobs, self.budget = jobs, budget_bytes
        self.stages, self.count = range(len(budget_bytes)), range(len(jobs))
        self.most = -(-most_ns // grain_ns)
        self.forward = [[n // grain_ns for n in j.forward_ns] for j in jobs]
        self.backward = [[n // grain_ns for n in j.backward_ns] for j in jobs]
        self.x: dict[tuple[int, int], Term] = {}
        self.y: dict[tuple[int, int], Term] = {}
        self.z: dict[tuple[int, int, int], Term] = {}

    def rows(self, number: Callable[[str, int], Term], choice: Callable[[str], Term]) -> list[Term]:
        """Every constraint, with variables made by `number` (name, largest) and `choice` (name); the first is the objective."""
        end = number("T", self.most)
        f = [[number(f"f{u}_{s}", self.most) for s in self.stages] for u in self.count]
        b = [[number(f"b{u}_{s}", self.most) for s in self.stages] for u in self.count]
        rows = [end]
        for u in self.count:
            rows += self._chain(f[u], b[u], u)
            rows.append(end >= b[u][0] + self.backward[u][0])
        for u in self.count:
            for v in range(u + 1, len(self.jobs)):
                # Of equal jobs the first goes first.
                alike = self.jobs[u].kind == self.jobs[v].kind
                self.x[u, v] = 1 if alike else choice(f"x{u}_{v}")
                self.y[u, v] = 1 if alike else choice(f"y{u}_{v}")
                for s in self.stages:
                    rows += self._apart(f[u][s], self.forward[u][s], f[v][s], self.forward[v][s], self.x[u, v])
                    rows += self._apart(b[u][s], self.backward[u][s], b[v][s], self.backward[v][s], self.y[u, v])
        for s in self.stages:
            rows += self._across(s, f, b, choice)
        return rows

    def _chain(self, f: Sequence[Term], b: Sequence[Term], u: int) -> list[Term]:
        down = [f[s + 1] >= f[s] + self.forward[u][s] for s in self.stages[:-1]]
        up = [b[s] >= b[s + 1] + self.backward[u][s + 1] for s in self.stages[:-1]]
        return [*down, b[-1] >= f[-1] + self.forward[u][-1], *up]

    def _apart(self, first: Term, first_took: int, second: Term, second_took: int, order: Term) -> list[Term]:
        """`order` 1: the first ends before the second starts; 0: the other way round."""
        rows = [] if isinstance(order, int) else [first >= second + second_took - self.most * order]
        return [second >= first + first_took - self.most * (1 - order), *rows]

    def _across(
        self, s: int, f: Sequence[Sequence[Term]], b: Sequence[Sequence[Term]], choice: Callable[[str], Term]
    ) -> list[Term]:
        rows = []
        for u in self.count:
            held = self.jobs[u].held_bytes[s]
            inside: Term = 0
            for v in self.count:
                if u == v:
                    continue
                z = self.z[s, u, v] = choice(f"z{s}_{u}_{v}")
                rows += self._apart(b[v][s], self.backward[v][s], f[u][s], self.forward[u][s], z)
                rows.append(z <= self.before(self.x, v, u))
                # Bytes as parts of the budget, so that numbers stay small.
                inside += (self.jobs[v].held_bytes[s] / max(self.budget[s], held, 1)) * (self.before(self.x, v, u) - z)
            if not isinstance(inside, int):
                rows.append(inside <= 1 - held / max(self.budget[s], held, 1))
        return rows

    def before(self, order: dict[tuple[int, int], Term], u: int, v: int) -> Term:
        """1 if u goes before v."""
        return order[u, v] if u < v else 1 - order[v, u]

    def sequences(self, value: Callable[[Term], int]) -> Sequences:
        """What each stage runs in a solution: an item's place is the number of items before it."""
        x = {pair: value(term) for pair, term in self.x.items()}
        y = {pair: value(term) for pair, term in self.y.items()}
        found = []
        for s in self.stages:
            places: list[tuple[int, str, int]] = []
            for u in self.count:
                others = [v for v in self.count if v != u]
                z = [value(self.z[s, u, v]) for v in others]
                places.append((sum(self.before(x, v, u) for v in others) + sum(z), "forward", u))
                ahead = [1 - value(self.z[s, v, u]) for v in others]
                places.append((1 + sum(self.before(y, v, u) for v in others) + sum(ahead), "backward", u))
            found.append(tuple((way, u) for _, way, u in sorted(places)))
        return tuple(found)  # type: ignore[arg-type]
