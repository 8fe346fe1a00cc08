"""Predictions by canonical plan: equal multisets of task types on equal shapes are predicted once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from muxtune.spec.errors import NoAnswerError
from muxtune.spec.fleet import InstanceShape, Pricer, TaskType
from muxtune.spec.noun import digest, noun

#: Of merged multisets one in so many is planned exactly as well.
SAMPLED = 100


@noun
class Price:
    """One iteration of an instance: its time, billed tokens, joules (None: unknown), share of device time computed in."""

    iteration_ns: int
    billed_tokens: int
    joules: float | None
    busy: float
    peak_bytes: int
    relative_error: float

    @property
    def tokens_per_s(self) -> float:
        """Billed tokens per second."""
        return 1e9 * self.billed_tokens / self.iteration_ns


@noun
class Refusal:
    """Why some tasks cannot share an instance of a shape."""

    reason: str


class Shelf:
    """What a pricer said of multisets on shapes, for several replays; tasks are named by their digests, in their order."""

    def __init__(self, pricer: Pricer | Callable[[Sequence[TaskType], InstanceShape], Price]) -> None:
        self.pricer = pricer
        self.known: dict[tuple[tuple[str, ...], InstanceShape], Price | Refusal] = {}

    def ask(self, types: Sequence[TaskType], names: Sequence[str], shape: InstanceShape, keep: bool) -> Price | Refusal:
        """The price; equal multisets are priced once where `keep`."""
        ordered = sorted(zip(names, types, strict=True), key=lambda x: x[0])
        key = (tuple(name for name, _ in ordered), shape)
        found = self.known.get(key) if keep else None
        if found is None:
            found = self.known[key] = self._make([t for _, t in ordered], shape)
        return found

    def _make(self, types: Sequence[TaskType], shape: InstanceShape) -> Price | Refusal:
        try:
            seen = self.pricer(types, shape)
        except NoAnswerError as error:
            return Refusal(reason=str(error))
        if isinstance(seen, Price):
            return seen
        return Price(
            iteration_ns=max(1, seen.iteration_ns),
            billed_tokens=seen.billed_tokens,
            joules=seen.energy_j,
            busy=1.0 if seen.utilisation is None else seen.utilisation,
            peak_bytes=max(seen.peak_bytes, default=0),
            relative_error=seen.relative_error,
        )


class Prices:
    """Task types and shapes of one replay by number, and their prices. Types keep the order in which they first came.

    `made` counts the distinct plans that this replay needed, whether the shelf had them or not. With `merge` a task is planned
    as the type that stands for its class (quantisation); one in `SAMPLED` of the multisets, by a hash, is planned as it is too,
    and `errors` has merged / exact iteration time − 1 of these. With `quick` multisets are priced there, and the sampled ones by
    `shelf` too. Times alone are always exact.
    """

    def __init__(
        self,
        shelf: Shelf,
        solo: Shelf,
        cached: bool = True,
        merge: Callable[[TaskType], TaskType] | None = None,
        quick: Shelf | None = None,
        seed: int = 0,
    ) -> None:
        self.shelf, self.solo, self.cached, self.merge = shelf, solo, cached, merge
        self.quick, self.seed = quick, seed
        self.errors: list[float] = []
        self._merged: dict[int, tuple[TaskType, str]] = {}
        self._plans: set[tuple[int, tuple[str, ...]]] = set()
        self.kinds: list[TaskType] = []
        self.shapes: list[InstanceShape] = []
        self.asked = self.made = 0
        self.worst_error = 0.0
        self.has_energy = True
        self._names: list[str] = []
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
            self._names.append(digest(task))
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
            found = self._known[key] = self._make(kinds, shape)
            if isinstance(found, Price):
                self.worst_error = max(self.worst_error, found.relative_error)
                self.has_energy &= found.joules is not None
        return found

    def _make(self, kinds: tuple[int, ...], shape: int) -> Price | Refusal:
        if self.merge is None:
            self.made += 1
            found = self._look(self.quick or self.shelf, kinds, shape)
            if self.quick is not None:
                self._sample(found, kinds, shape)
            return found
        types, names = zip(*map(self._class, kinds), strict=True)
        found = self.shelf.ask(types, names, self.shapes[shape], self.cached)
        plan = (shape, tuple(sorted(names)))
        self.made += plan not in self._plans
        self._plans.add(plan)
        self._sample(found, kinds, shape)
        return found

    def _sample(self, found: Price | Refusal, kinds: tuple[int, ...], shape: int) -> None:
        """Hold one price in so many against the exact one."""
        if int(digest([self.seed, *sorted(self._names[k] for k in kinds)]), 16) % SAMPLED:
            return
        exact = self._look(self.shelf, kinds, shape)
        if isinstance(exact, Price) and isinstance(found, Price):
            self.worst_error = max(self.worst_error, exact.relative_error)
            self.errors.append(found.iteration_ns / exact.iteration_ns - 1)

    def _class(self, kind: int) -> tuple[TaskType, str]:
        """The type that stands for a type, and its digest."""
        if kind not in self._merged:
            assert self.merge is not None
            made = self.merge(self.kinds[kind])
            self._merged[kind] = (made, digest(made))
        return self._merged[kind]

    def _look(self, shelf: Shelf, kinds: Sequence[int], shape: int) -> Price | Refusal:
        types, names = [self.kinds[k] for k in kinds], [self._names[k] for k in kinds]
        return shelf.ask(types, names, self.shapes[shape], self.cached)

    def alone_ns(self, kind: int, shape: int) -> int:
        """Time of one step of a task alone under the reference policy; 0 where it does not fit."""
        key = (kind, shape)
        if key not in self._alone:
            found = self._look(self.solo, (kind,), shape)
            self._alone[key] = found.iteration_ns if isinstance(found, Price) else 0
        return self._alone[key]
