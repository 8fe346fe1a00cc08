"""Floors of a column's price under `pad`, from its number of rows and sums over its tasks.

With R rows padded to the longest length L and j any task in it, 2·L^s ≥ backbone_s(R, L) + Σ_g max(once_jgs + Σ_k p_k·shared_kgs,
alone_jgs) over the BaseOps and directions g: what adapters add to those of others, and what all take at least. Patterns are
divided by L and by their task of largest `alone`; each form of a family takes one side of every max.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from muxtune.policies.build import microbatch_samples
from muxtune.policies.columns import Columns
from muxtune.policies.stage_latency import AdapterFloor, Shape
from muxtune.policies.surrogate import Surrogate
from muxtune.spec.errors import ExtrapolationError
from muxtune.spec.tensors import held_bytes, working_bytes

Ints = NDArray[np.int64]
Adapters = Mapping[str, AdapterFloor]
#: Beyond every price, and far from overflow.
NEVER = 1 << 60
#: A stage that never runs so many rows; sums and multiples of it stay below NEVER.
CLOSED = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Floors of the patterns of one longest length and largest adapters; row index r stands for r·grain rows.

    A pattern of `types` with r rows costs at least max over forms of fixed_ns[form, r] + Σ_k p_k·adapters_ns[k, form] in the
    steady phase, and first_ns[r] + max(Σ_k p_k·first_adapters_ns[k], first_least_ns) in warm-up and drain.
    """

    length: int
    types: tuple[int, ...]
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    fixed_ns: Ints
    adapters_ns: Ints
    first_ns: Ints
    first_adapters_ns: Ints
    first_least_ns: int

    @property
    def most(self) -> int:
        """Largest row index."""
        return int(self.first_ns.size) - 1

    def steady_ns(self, pattern: tuple[int, ...]) -> int:
        """What a pattern of this family costs at least in the steady phase."""
        counts, row = self._counted(pattern)
        return int((self.fixed_ns[:, row] + counts @ self.adapters_ns).max())

    def warmup_ns(self, pattern: tuple[int, ...]) -> int:
        """What a pattern of this family costs at least in warm-up and drain."""
        counts, row = self._counted(pattern)
        return int(self.first_ns[row]) + max(int(counts @ self.first_adapters_ns), self.first_least_ns)

    def _counted(self, pattern: tuple[int, ...]) -> tuple[Ints, int]:
        counts = np.array([pattern[k] for k in self.types], dtype=np.int64)
        return counts, int(counts @ np.array(self.rows))


class Floors:
    """Makes the floors of a state's columns."""

    def __init__(self, columns: Columns, surrogate: Surrogate) -> None:
        self.surrogate, self.counts = surrogate, columns.counts
        self.leads = [members[0] for members in columns.types]
        tasks = [surrogate.tasks[t] for t in self.leads]
        self.billed = [t.billed_len_tokens for t in tasks]
        samples = [microbatch_samples(t, surrogate.state.microbatches) for t in tasks]
        self.grain = gcd(*samples)
        self.rows = [n // self.grain for n in samples]
        self.fewest_samples = min(t.global_batch_samples for t in tasks)

    def every(self) -> tuple[Floor, ...]:
        """Floors of all patterns, by ascending longest length, then largest adapters."""
        return tuple(floor for length in sorted(set(self.billed)) for floor in self._of_length(length))

    def _of_length(self, length: int) -> Iterator[Floor]:
        adapters = self._adapters(length)
        if not adapters:
            return
        rows = sum(self.rows[k] * self.counts[k] for k in adapters)
        backbone = self._backbone(length, max(self._rows_that_fit(k, length, rows) for k in adapters))
        forms = _forms(adapters)
        if len(forms) == 1:
            yield self._floor(length, adapters, backbone, forms, list(adapters.values()))
            return
        sizes = {k: sum(sum(x.alone_ns) for x in a.values()) for k, a in adapters.items()}
        for size in sorted(set(sizes.values())):
            below = {k: a for k, a in adapters.items() if sizes[k] <= size}
            largest = [a for k, a in adapters.items() if sizes[k] == size]
            yield self._floor(length, below, backbone, forms, largest)

    def _adapters(self, length: int) -> dict[int, Adapters]:
        """Adapter floors by type; types that the cost model does not answer for at this length are left out."""
        found: dict[int, Adapters] = {}
        for k, lead in enumerate(self.leads):
            if self.billed[k] <= length:
                try:
                    found[k] = self.surrogate.latency.adapter_floors(lead, self.rows[k] * self.grain * length)
                except ExtrapolationError:
                    continue
        return found

    def _backbone(self, length: int, most: int) -> Ints:
        """(stages, rows); closed where the cost model does not answer."""
        found = np.full((self.surrogate.stages, most + 1), CLOSED, dtype=np.int64)
        for row in range(1, most + 1):
            try:
                found[:, row] = self.surrogate.latency.backbone_ns(row * self.grain, length)
            except ExtrapolationError:
                continue
        return found

    def _floor(
        self,
        length: int,
        adapters: Mapping[int, Adapters],
        backbone: Ints,
        forms: list[frozenset[str]],
        largest: list[Adapters],
    ) -> Floor:
        """The family of patterns of these types, one of `largest` in each; a form is the set of groups that share."""
        types = tuple(adapters)
        rows, counts = tuple(self.rows[k] for k in types), tuple(self.counts[k] for k in types)
        most = min(backbone.shape[1] - 1, sum(r * n for r, n in zip(rows, counts, strict=True)))
        backbone = backbone[:, : most + 1]
        fixed = np.concatenate([backbone + self._once(largest, form)[:, None] for form in forms])
        shared = np.concatenate([[self._shared(a, form) for a in adapters.values()] for form in forms], axis=1)
        kept = _undominated(fixed, shared)
        everything = forms[-1]
        repeats = self.surrogate.microbatches_per_replica
        return Floor(
            length=length,
            types=types,
            rows=rows,
            counts=counts,
            fixed_ns=repeats * fixed[kept],
            adapters_ns=repeats * shared[:, kept],
            first_ns=backbone[:-1].sum(axis=0),
            first_adapters_ns=np.array([sum(self._shared(a, everything)[:-1]) for a in adapters.values()]),
            first_least_ns=int(self._once(largest, frozenset())[:-1].sum()),
        )

    def _shared(self, adapters: Adapters, form: frozenset[str]) -> Ints:
        """What a type adds on each stage in the groups that share."""
        found = [x.shared_ns for group, x in adapters.items() if group in form]
        sums: Ints = np.array(found, dtype=np.int64).reshape(-1, self.surrogate.stages).sum(axis=0)
        return sums

    def _once(self, largest: list[Adapters], form: frozenset[str]) -> Ints:
        """On each stage the least of `once` where a group shares and `alone` where it does not."""
        sums = [[x.once_ns if g in form else x.alone_ns for g, x in a.items()] for a in largest]
        least: Ints = np.array([np.sum(x, axis=0) for x in sums], dtype=np.int64).min(axis=0)
        return least

    def _rows_that_fit(self, k: int, length: int, most: int) -> int:
        """Most rows that fit in memory if all are of type k: memory grows with rows."""
        fits, too_many = 0, most + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._fits(k, middle * self.grain, length):
                fits = middle
            else:
                too_many = middle
        return fits

    def _fits(self, k: int, rows: int, length: int) -> bool:
        """Whether rows of type k fit with what every hTask of so many rows needs at least, rounding left out."""
        surrogate = self.surrogate
        batch = Shape(parts=((self.leads[k], rows, length),)).token_batch()
        units = min(surrogate.microbatches_per_replica, self.fewest_samples)
        return all(
            surrogate.static_bytes[s]
            + min(surrogate.stages - s, units) * held_bytes(c, batch)
            + working_bytes(c, batch)
            <= surrogate.memory_bytes
            for s, c in enumerate(surrogate.contexts)
        )


def _forms(adapters: Mapping[int, Adapters]) -> list[frozenset[str]]:
    """Sets of groups that share, from few to all: the larger a column, the more groups cost what they share.

    A group in which nothing is saved by sharing always counts as shared.
    """
    shared: dict[str, int] = {}
    alone: dict[str, int] = {}
    for floors in adapters.values():
        for group, x in floors.items():
            shared[group] = shared.get(group, 0) + sum(x.shared_ns) + sum(x.once_ns)
            alone[group] = alone.get(group, 0) + sum(x.alone_ns)
    always = frozenset(g for g in shared if shared[g] >= alone[g])
    saving = sorted(shared.keys() - always, key=lambda g: (-shared[g] / max(1, alone[g]), g))
    return [always | frozenset(saving[:i]) for i in range(len(saving) + 1)]


def _undominated(fixed: Ints, sums: Ints) -> list[int]:
    """Forms that can be the largest: not below another one in the fixed part and every adapter."""
    kept: list[int] = []
    for s in range(len(fixed) - 1, -1, -1):
        if not any((fixed[s] <= fixed[t]).all() and (sums[:, s] <= sums[:, t]).all() for t in kept):
            kept.append(s)
    return kept
