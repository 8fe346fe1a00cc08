"""Messages over a link, from its data sheet: p2p, and collectives as a ring or a tree.

With n ranks, latency a and B bytes at bandwidth b: a ring is n−1 messages of B/n for a reduce-scatter or an all-gather and
twice that for an all-reduce; a tree all-reduce climbs and descends ⌈log2 n⌉ levels, 2·⌈log2 n⌉·a + 2·B/b.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

from muxtune.spec.cluster import LINKS, DeviceSpec, Link, device_presets, parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.ops import COLLECTIVES, Op
from muxtune.spec.units import NS_PER_S

#: How an all-reduce runs; `cheapest` is the better of the two for its size. Other collectives are rings.
Algorithm = Literal["cheapest", "ring", "tree"]
#: Families that need a link.
LINKED = frozenset({"p2p", *COLLECTIVES})


def link_ns(op: Op, link: Link, algorithm: Algorithm = "cheapest") -> int:
    """Time of a message over a link, at least 1 ns.

    Raises:
        InputError: the operator is no message.
    """
    require_message(op)
    if op.family == "p2p":
        return max(1, link.latency_ns + math.ceil(op.size[0] * NS_PER_S / link.bandwidth_bytes_per_s))
    ring_ns, tree_ns = _ring_ns(op, link), _tree_ns(op, link)
    if op.family != "all_reduce" or algorithm == "ring":
        return ring_ns
    return tree_ns if algorithm == "tree" else min(ring_ns, tree_ns)


def require_message(op: Op) -> None:
    """Refuse an operator that is no message.

    Raises:
        InputError: it does not travel over a link.
    """
    if op.family not in LINKED:
        raise InputError(f"operator {op.family!r} does not travel over a link: only {sorted(LINKED)} do")


def _ring_ns(op: Op, link: Link) -> int:
    ranks = op.shape[0]
    messages = (2 if op.family == "all_reduce" else 1) * (ranks - 1)
    transfer_ns = op.size[0] * NS_PER_S / link.bandwidth_bytes_per_s
    return max(1, messages * link.latency_ns + math.ceil(transfer_ns * messages / ranks))


def _tree_ns(op: Op, link: Link) -> int:
    """All bytes up and down; pieces follow each other so closely that only the first pays the latency of every level."""
    levels = (op.shape[0] - 1).bit_length()
    ways = 2 if levels else 0
    transfer_ns = op.size[0] * NS_PER_S / link.bandwidth_bytes_per_s
    return max(1, ways * levels * link.latency_ns + math.ceil(ways * transfer_ns))


@cache
def usual_link(device: DeviceSpec) -> Link:
    """The link inside a node of this device, for callers that name none; PCIe for a device that is no preset."""
    return parse_cluster(device.name).nodes[0].link if device.name in device_presets() else LINKS["pcie"]
