"""Clusters: a name that is parsed (`4xA40-nvlink`), or a YAML or JSON file of nodes and links (DESIGN §11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muxtune.spec.cluster import LINKS, NVLINK_BYTES_PER_S, Cluster, device_presets, parse_cluster
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.files import read_data, validate
from muxtune.spec.noun import plain

SUFFIXES = (".yaml", ".yml", ".json")


def read_cluster(name_or_path: str) -> Cluster:
    """A cluster by name or from a file.

    A file has `device` (preset or all its figures), `nodes: [{gpus, link}]`, and optionally `network` (`ib` unless
    given) and `name`. A link is the name of a preset or a mapping of kind, bandwidth_bytes_per_s and latency_ns.

    Raises:
        InputError: wrong file or name; UnknownKeyError: no such device or link.
    """
    path = Path(name_or_path)
    return _read_file(path) if path.suffix in SUFFIXES else parse_cluster(name_or_path)


def _read_file(path: Path) -> Cluster:
    data = read_data(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping with device, nodes and network")
    device = _named(data.get("device"), {name: plain(spec) for name, spec in device_presets().items()}, path, "device")
    links = {name: plain(link) for name, link in LINKS.items()}
    if isinstance(device, dict) and device.get("name") in NVLINK_BYTES_PER_S:
        links["nvlink"]["bandwidth_bytes_per_s"] = NVLINK_BYTES_PER_S[device["name"]]
    nodes = data.get("nodes")
    if isinstance(nodes, list):
        nodes = [_node(node, links, path) for node in nodes]
    filled = {
        "name": path.stem,
        **data,
        "device": device,
        "nodes": nodes,
        "network": _named(data.get("network", "ib"), links, path, "network"),
    }
    if not filled["nodes"]:
        raise InputError(f"{path}: nodes is empty or missing: list at least one node with gpus and link")
    return validate(Cluster, filled, str(path))


def _node(node: Any, links: dict[str, Any], path: Path) -> Any:
    return (
        {**node, "link": _named(node["link"], links, path, "link")}
        if isinstance(node, dict) and "link" in node
        else node
    )


def _named(value: Any, presets: dict[str, Any], path: Path, kind: str) -> Any:
    """The preset that a text names; anything else is left to validation."""
    if not isinstance(value, str):
        return value
    if value not in presets:
        raise UnknownKeyError(f"{kind} in {path}", value, presets)
    return presets[value]
