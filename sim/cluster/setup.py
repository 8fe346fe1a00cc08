"""What a replay is asked: devices, sizes of instances, costs of changes, faults, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from muxtune.spec.cluster import Cluster
from muxtune.spec.fleet import Fault, FleetCosts, InstanceShape
from muxtune.spec.layout import Layout
from muxtune.spec.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A fleet and how it is run.

    `clusters` are pools of one device type each. `models` are the backbones by name, `layouts` the layout of an instance of
    each. At most `tasks_per_instance` tasks share one. The reference instance of the work rule stands in pool 0.
    `until_ns` ends the replay, else it ends when every job has left. A job is given up after `max_restarts` failures.
    """

    clusters: tuple[Cluster, ...]
    models: dict[str, ModelSpec]
    layouts: dict[str, Layout]
    microbatches: int = 4
    tasks_per_instance: int = 8
    max_instances: int | None = None
    costs: FleetCosts = field(default_factory=FleetCosts)
    faults: Iterable[Fault] = ()
    until_ns: int | None = None
    max_restarts: int | None = None
    stop: Callable[[], bool] | None = None

    def weights_bytes(self, model: str) -> int:
        """Bytes of a backbone."""
        spec = self.models[model]
        return spec.parameters * spec.element_bytes

    def reference(self, model: str) -> InstanceShape:
        """The reference instance: the first devices of pool 0."""
        from_nodes = self.clusters[0]
        return shape_of(self, model, slice_of(from_nodes, self.layouts[model].ranks))


def shape_of(setup: Setup, model: str, part: Cluster, clock_mhz: int = 0) -> InstanceShape:
    """The shape of an instance on a part of a cluster."""
    return InstanceShape(
        model=model,
        slice=part,
        layout=setup.layouts[model],
        microbatches=setup.microbatches,
        frequency_mhz=clock_mhz,
    )


def slice_of(cluster: Cluster, size: int) -> Cluster:
    """What an instance of `size` devices sees on an empty cluster."""
    from muxtune.sim.cluster.pool import Pool

    pool = Pool(cluster)
    split = pool.split(min(size, cluster.size), 1)
    return cluster if split is None else pool.slice(split)
