"""What a replay is asked: devices, sizes of instances, costs of changes, faults, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from muxtune.sim.cluster.pool import Pool
from muxtune.spec.cluster import Cluster
from muxtune.spec.errors import InputError
from muxtune.spec.fleet import Fault, FleetCosts, InstanceShape
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec, model_preset


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A fleet and how it is run.

    `clusters` are pools of one device type each. `layout_of` and `microbatches_of` say how an instance of a backbone runs. At
    most `tasks_per_instance` tasks share one. The reference instance of the work rule is `reference_of`, or a usual one on
    pool 0.
    `until_ns` ends the replay, else it ends when every job has left. A job is given up after `max_restarts` failures.
    `stop` is asked now and then whether to end early.
    """

    clusters: tuple[Cluster, ...]
    layout_of: Callable[[ModelSpec], Layout]
    model_of: Callable[[str], ModelSpec] = model_preset
    microbatches_of: Callable[[ModelSpec], int] = lambda model: 4
    reference_of: Callable[[ModelSpec], InstanceShape] | None = None
    tasks_per_instance: int = 8
    max_instances: int | None = None
    costs: FleetCosts = field(default_factory=FleetCosts)
    faults: Iterable[Fault] = ()
    until_ns: int | None = None
    max_restarts: int | None = None
    stop: Callable[[], bool] | None = None


class Served:
    """Backbones as they come up: their layouts, weights, and shapes on a pool that is empty."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._models: dict[str, ModelSpec] = {}
        self._layouts: dict[str, Layout] = {}
        self._counts: dict[str, int] = {}

    def model(self, name: str) -> ModelSpec:
        """A backbone.

        Raises:
            UnknownKeyError: there is none of this name.
        """
        if name not in self._models:
            self._models[name] = self.setup.model_of(name)
        return self._models[name]

    def layout(self, name: str) -> Layout:
        """The layout of its instances."""
        if name not in self._layouts:
            self._layouts[name] = self.setup.layout_of(self.model(name))
            self._counts[name] = self.setup.microbatches_of(self.model(name))
        return self._layouts[name]

    def weights_bytes(self, name: str) -> int:
        """Bytes of a backbone."""
        model = self.model(name)
        return model.parameters * model.element_bytes

    def shape(self, name: str, part: Cluster) -> InstanceShape:
        """The shape of an instance on a part of a cluster."""
        layout = self.layout(name)
        return InstanceShape(model=name, slice=part, layout=layout, microbatches=self._counts[name])

    def empty_shape(self, name: str, pool: int) -> InstanceShape | None:
        """The shape of an instance on a pool of which nothing is taken; None where it does not fit."""
        place = Pool(self.setup.clusters[pool])
        layout = self.layout(name)
        split = place.split(layout.ranks, layout.tp)
        return None if split is None else self.shape(name, place.slice(split))

    def reference(self, name: str) -> InstanceShape:
        """The reference instance of the work rule: on the first pool.

        Raises:
            InputError: it does not fit there.
        """
        if self.setup.reference_of is not None:
            return self.setup.reference_of(self.model(name))
        found = self.empty_shape(name, 0)
        if found is None:
            cluster, layout = self.setup.clusters[0], self.layout(name)
            raise InputError(
                f"an instance of {name} ({layout.name}) needs {layout.ranks} devices, cluster {cluster.name} has "
                f"{cluster.size}: give a larger --cluster or a smaller --gpus-per-instance"
            )
        return found
