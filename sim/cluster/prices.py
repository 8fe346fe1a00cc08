"""Predictions by canonical plan: equal multisets of task types on equal shapes are predicted once, and kept."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.spec.errors import NoAnswerError
from muxtune.spec.fleet import InstanceShape, Pricer, TaskType
from muxtune.spec.noun import noun


@noun
class Price:
    """One iteration of an instance: its time, billed tokens, joules (0 where unknown), share of device time computed in."""

    iteration_ns: int
    billed_tokens: int
    joules: float
    busy: float
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Billed tokens per second."""
        return 1e9 * self.billed_tokens / self.iteration_ns


@noun
class Refusal:
    """Why some tasks cannot share an instance of a shape."""

    reason: str


class Prices:
    """Task types and shapes by number, and what was predicted of them. Types keep the order in which they first came."""

    def __init__(self, pricer: Pricer, solo: Pricer | None = None, cached: bool = True) -> None:
        self.pricer = pricer
        self.solo = solo or pricer
        self.cached = cached
        self.kinds: list[TaskType] = []
        self.shapes: list[InstanceShape] = []
        self.asked = self.made = 0
        self.worst_error = 0.0
        self.has_energy = True
        self._kind: dict[TaskType, int] = {}
        self._shape: dict[InstanceShape, int] = {}
        self._known: dict[tuple[int, tuple[int, ...]], Price | Refusal] = {}
        self._alone: dict[tuple[int, int], int] = {}

    def kind(self, task: TaskType) -> int:
        """The number of a task type."""
        found = self._kind.get(task)
        if found is None:
            found = self._kind[task] = len(self.kinds)
            self.kinds.append(task)
        return found

    def shape(self, shape: InstanceShape) -> int:
        """The number of a shape."""
        found = self._shape.get(shape)
        if found is None:
            found = self._shape[shape] = len(self.shapes)
            self.shapes.append(shape)
        return found

    def ask(self, kinds: tuple[int, ...], shape: int) -> Price | Refusal:
        """The price of a multiset of task types (sorted numbers) on a shape (its number)."""
        self.asked += 1
        key = (shape, kinds)
        found = self._known.get(key)
        if found is None or not self.cached:
            found = self._known[key] = self._make(kinds, self.shapes[shape])
        return found

    def _make(self, kinds: Sequence[int], shape: InstanceShape) -> Price | Refusal:
        self.made += 1
        try:
            seen = self.pricer([self.kinds[k] for k in kinds], shape)
        except NoAnswerError as error:
            return Refusal(reason=str(error))
        self.has_energy &= seen.energy_j is not None
        self.worst_error = max(self.worst_error, seen.relative_error)
        return Price(
            iteration_ns=max(1, seen.iteration_ns),
            billed_tokens=seen.billed_tokens,
            joules=seen.energy_j or 0.0,
            busy=1.0 if seen.utilisation is None else seen.utilisation,
            peak_bytes=max(seen.peak_bytes, default=0),
        )

    def alone_ns(self, kind: int, shape: int) -> int:
        """Time of one step of a task alone under the reference policy.

        Raises:
            NoAnswerError: it does not fit.
        """
        key = (kind, shape)
        if key not in self._alone:
            self._alone[key] = max(1, self.solo([self.kinds[kind]], self.shapes[shape]).iteration_ns)
        return self._alone[key]
