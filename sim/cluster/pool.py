"""Devices of several clusters, node by node: what is free, taken, down or slow; instances are placed on as few nodes as fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from muxtune.spec.cluster import Cluster, Node


class Pool:
    """Devices of one type. Numbers are global: those of this pool start at `first`."""

    def __init__(self, cluster: Cluster, first: int = 0) -> None:
        self.cluster = cluster
        self.first = first
        self.down: set[int] = set()
        self._free: list[list[int]] = []
        self._node: dict[int, int] = {}
        number = first
        for place, node in enumerate(cluster.nodes):
            devices = list(range(number, number + node.gpus))
            self._free.append(devices)
            self._node.update(dict.fromkeys(devices, place))
            number += node.gpus
        self.end = number
        self.free = cluster.size

    def node_devices(self, device: int) -> tuple[int, ...]:
        """Every device of the node that holds this one."""
        place = self._node[device]
        return tuple(d for d, p in self._node.items() if p == place)

    def split(self, size: int, tp: int) -> list[tuple[int, int]] | None:
        """[(node, devices taken there)] for an instance, or None where it does not fit.

        The fullest node that has room for all of it; else the emptiest nodes, each giving a multiple of `tp` so that no
        tensor-parallel group crosses nodes.
        """
        if size > self.free:
            return None
        fitting = [(len(f), place) for place, f in enumerate(self._free) if len(f) >= size]
        if fitting:
            return [(min(fitting)[1], size)]
        taken: list[tuple[int, int]] = []
        for free, place in sorted(((len(f), p) for p, f in enumerate(self._free)), key=lambda x: (-x[0], x[1])):
            give = min(size, free - free % tp)
            if give > 0:
                taken.append((place, give))
                size -= give
            if size == 0:
                return sorted(taken)
        return None

    def split_of(self, devices: Iterable[int]) -> list[tuple[int, int]]:
        """[(node, devices there)] of some devices of this pool."""
        counts = Counter(self._node[d] for d in devices)
        return sorted(counts.items())

    def take(self, split: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """Take the devices that `split` named."""
        devices: list[int] = []
        for place, count in split:
            devices += self._free[place][:count]
            del self._free[place][:count]
            self.free -= count
        return tuple(devices)

    def give_back(self, devices: Iterable[int]) -> None:
        """Free devices; those that are down stay out until `repair`."""
        for device in devices:
            if device not in self.down:
                line = self._free[self._node[device]]
                line.append(device)
                line.sort()
                self.free += 1

    def fail(self, device: int) -> bool:
        """Mark a device as down; whether it was free."""
        self.down.add(device)
        line = self._free[self._node[device]]
        if device in line:
            line.remove(device)
            self.free -= 1
            return True
        return False

    def repair(self, device: int) -> None:
        """A device that was down is free again."""
        self.down.discard(device)
        self.give_back((device,))

    def slice(self, split: Sequence[tuple[int, int]]) -> Cluster:
        """The part of the cluster that an instance sees: its nodes with the devices it has there, and their links.

        Equal parts are equal nouns, wherever they stand and however large the cluster is.
        """
        nodes = tuple(Node(gpus=count, link=self.cluster.nodes[place].link) for place, count in split)
        ordered = tuple(sorted(nodes, key=lambda n: (-n.gpus, n.link.kind)))
        sizes = "+".join(str(n.gpus) for n in ordered)
        name = f"{sizes}x{self.cluster.device.name}-{ordered[0].link.kind}"
        return replace(self.cluster, name=name, nodes=ordered)
