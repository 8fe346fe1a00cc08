"""DeviceSpec, Link, Node, Cluster; names such as `4xA40-nvlink`, `8x2xA40-ib`, `1xH100`, `cpu` are parsed, not listed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.noun import noun
from muxtune.spec.units import GIB, check_range

PRESETS = Path(__file__).parent / "data" / "devices.json"


@noun
class DeviceSpec:
    """One accelerator (or CPU core). Peaks are vendor data sheet figures, dense; `launch_ns` is host time per launch."""

    name: str
    peak_flops_fp32: int
    peak_flops_half: int
    memory_bytes: int
    bandwidth_bytes_per_s: int
    sm_count: int
    launch_ns: int
    idle_w: float
    peak_w: float
    frequency_mhz: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = ("peak_flops_fp32", "peak_flops_half", "memory_bytes", "bandwidth_bytes_per_s", "sm_count")
        for name in sizes:
            check_range(f"device {self.name}: {name}", getattr(self, name), 1)
        check_range(f"device {self.name}: launch_ns", self.launch_ns, 0)
        for step in self.frequency_mhz:
            check_range(f"device {self.name}: frequency_mhz", step, 1)
        if not self.name:
            raise ValueError("device: name is empty: give it a name")
        if not 0 <= self.idle_w <= self.peak_w < math.inf:
            raise ValueError(
                f"device {self.name}: idle_w={self.idle_w}, peak_w={self.peak_w}: needs 0 <= idle_w <= peak_w, finite"
            )

    @property
    def is_cpu(self) -> bool:
        """On a CPU, host and compute are one resource (DESIGN §4)."""
        return self.name == "cpu"

    def peak_flops(self, dtype: str) -> int:
        """Floating point operations per second for a dtype."""
        return self.peak_flops_fp32 if dtype == "fp32" else self.peak_flops_half


@noun
class Link:
    """A directed channel between two devices. `bandwidth_bytes_per_s` is per direction."""

    kind: Literal["local", "pcie", "nvlink", "ib"]
    bandwidth_bytes_per_s: int
    latency_ns: int

    def __post_init__(self) -> None:
        check_range(f"{self.kind} link: bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, 1)
        check_range(f"{self.kind} link: latency_ns", self.latency_ns, 0)


#: Per direction: PCIe 4.0 x16, NVLink per device family below, ConnectX-5 100 Gb/s; `local` is shared memory.
LINKS = {
    "local": Link(kind="local", bandwidth_bytes_per_s=4_000_000_000, latency_ns=60_000),
    "pcie": Link(kind="pcie", bandwidth_bytes_per_s=25_000_000_000, latency_ns=10_000),
    "nvlink": Link(kind="nvlink", bandwidth_bytes_per_s=300_000_000_000, latency_ns=5_000),
    "ib": Link(kind="ib", bandwidth_bytes_per_s=12_500_000_000, latency_ns=15_000),
}
#: NVLink differs by device: A40 has one bridge, Hopper and Blackwell a switch.
NVLINK_BYTES_PER_S = {"A40": 56_250_000_000, "H100": 450_000_000_000, "H200": 450_000_000_000, "B200": 900_000_000_000}

#: Devices without NVLink.
NO_NVLINK = ("L40S", "RTX4090")
#: Of a cluster: the simulator numbers every device, and plans carry every node.
MAX_DEVICES = 65_536


@noun
class Node:
    """One machine: its device count and the link between its devices."""

    gpus: int
    link: Link

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus={self.gpus}: a node has at least one")


@noun
class Cluster:
    """Nodes of one device type, joined by `network`. Devices are numbered node by node from 0."""

    name: str
    device: DeviceSpec
    nodes: tuple[Node, ...]
    network: Link

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError("nodes is empty: a cluster has at least one node")
        if self.size > MAX_DEVICES:
            raise ValueError(f"{self.size} devices: a cluster has at most {MAX_DEVICES}; name fewer")

    @property
    def size(self) -> int:
        """Number of devices."""
        return sum(n.gpus for n in self.nodes)

    def node_of(self, device: int) -> int:
        """Index of the node that holds a device."""
        for index, node in enumerate(self.nodes):
            if device < node.gpus:
                return index
            device -= node.gpus
        raise IndexError(device)

    def link(self, source: int, target: int) -> Link:
        """The channel from one device to another."""
        node = self.node_of(source)
        return self.nodes[node].link if node == self.node_of(target) else self.network

    def slowest_link(self, devices: Sequence[int]) -> Link:
        """The link between two of the devices that a collective over them waits for."""
        return slowest(self.link(a, b) for a in devices for b in devices if a != b)


def slowest(links: Iterable[Link]) -> Link:
    """Least bandwidth, then most latency."""
    return min(links, key=lambda x: (x.bandwidth_bytes_per_s, -x.latency_ns))


@cache
def device_presets() -> dict[str, DeviceSpec]:
    """Every preset of data/devices.json by name."""
    rows: dict[str, dict[str, Any]] = json.loads(PRESETS.read_text(encoding="utf-8"))
    return {name: _device(name, row) for name, row in rows.items()}


def _device(name: str, row: dict[str, Any]) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        peak_flops_fp32=round(row["peak_tflops"]["fp32"] * 1e12),
        peak_flops_half=round(row["peak_tflops"]["fp16"] * 1e12),
        memory_bytes=row["memory_gib"] * GIB,
        bandwidth_bytes_per_s=row["bandwidth_gb_per_s"] * 10**9,
        sm_count=row["sm_count"],
        launch_ns=row["launch_ns"],
        idle_w=row["idle_w"],
        peak_w=row["peak_w"],
        frequency_mhz=tuple(row["frequency_mhz"]),
    )


def parse_cluster(name: str) -> Cluster:
    """Build a Cluster from `[NODESx]GPUSxDEVICE[-LINK]` or `cpu`.

    LINK is nvlink or pcie inside a node (default nvlink where the device has it) or ib between nodes.

    Raises:
        InputError: the name does not parse; UnknownKeyError: no such device or link.
    """
    match = re.fullmatch(r"(?:(?:(\d{1,18})x)?(\d{1,18})x)?([A-Za-z][A-Za-z0-9]*)(?:-([a-z]+))?", name)
    if not match:
        raise InputError(
            f"cluster {name!r}: expected [NODESx]GPUSxDEVICE[-LINK], such as 4xA40-nvlink, 8x2xA40-ib, 1xH100, cpu"
        )
    nodes, gpus, device_name, link_name = match.groups()
    devices = {k.lower(): v for k, v in device_presets().items()}
    if device_name.lower() not in devices:
        raise UnknownKeyError("device", device_name, device_presets())
    if link_name is not None and link_name not in LINKS:
        raise UnknownKeyError("link", link_name, LINKS)
    device = devices[device_name.lower()]
    if int(nodes or 1) < 1 or int(gpus or 1) < 1:
        raise InputError(f"cluster {name!r}: node and device counts must be at least 1")
    if int(nodes or 1) * int(gpus or 1) > MAX_DEVICES:
        raise InputError(f"cluster {name!r}: a cluster has at most {MAX_DEVICES} devices; name fewer")
    links = ("local",) if device.is_cpu else ("pcie", "ib") if device.name in NO_NVLINK else tuple(LINKS)
    if link_name is not None and link_name not in links:
        raise InputError(
            f"cluster {name!r}: {device.name} has no {link_name} link: leave it away or name one of {', '.join(links)}"
        )
    inside = _inside_link(device, link_name)
    node = Node(gpus=int(gpus or 1), link=inside)
    network = inside if device.is_cpu else LINKS["ib"]
    return Cluster(name=name, device=device, nodes=(node,) * int(nodes or 1), network=network)


def _inside_link(device: DeviceSpec, link_name: str | None) -> Link:
    if device.is_cpu:
        return LINKS["local"]
    kind = link_name if link_name not in (None, "ib") else ("pcie" if device.name in NO_NVLINK else "nvlink")
    link = LINKS[str(kind)]
    if kind == "nvlink":
        rate = NVLINK_BYTES_PER_S.get(device.name, link.bandwidth_bytes_per_s)
        return Link(kind="nvlink", bandwidth_bytes_per_s=rate, latency_ns=link.latency_ns)
    return link
