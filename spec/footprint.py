"""Footprint: bytes in use on a rank by kind; Amount: what some tensors hold and what the allocator adds to them.

Rule of the allocator, by kind of device:
- cpu: none. A tensor takes its own bytes, as the allocation events that a CPU run is measured by count them.
- every other device: PyTorch's caching allocator. A tensor takes whole blocks of 512 bytes; from 10 MiB on, where it gets a
  segment of its own, whole units of 2 MiB. Room lost between tensors (fragmentation) is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.noun import noun
from muxtune.spec.units import MIB, format_bytes

BLOCK_BYTES = 512
#: Tensors of at least this size have a segment of their own, in units of SEGMENT_BYTES.
OWN_SEGMENT_BYTES = 10 * MIB
SEGMENT_BYTES = 2 * MIB

#: (bytes of a tensor, how many of them).
Tensors = tuple[tuple[int, int], ...]


@noun
class Amount:
    """Bytes of some tensors, and what the allocator takes beyond them."""

    size_bytes: int = 0
    rounding_bytes: int = 0

    @property
    def taken_bytes(self) -> int:
        """Both."""
        return self.size_bytes + self.rounding_bytes

    def times(self, count: int) -> Amount:
        """The same tensors several times."""
        return Amount(size_bytes=count * self.size_bytes, rounding_bytes=count * self.rounding_bytes)


@noun
class Footprint:
    """Bytes in use on one rank at one moment, by kind.

    `weights` are the frozen backbone's; `gradients` and `optimizer_states` the adapters'. `activations` are what batches keep
    from forward to backward (and, under recomputation, the layer that a backward has made again); `kv` are
    keys and values of packs in several chunks, with their gradients; `messages` are received and
    not yet used, or being sent; `workspace` is the transient of the operators that run; `rounding` what the allocator adds.
    """

    weights_bytes: int = 0
    adapters_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_states_bytes: int = 0
    activations_bytes: int = 0
    kv_bytes: int = 0
    messages_bytes: int = 0
    workspace_bytes: int = 0
    rounding_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything that is in use."""
        return sum(size_bytes for _, size_bytes in self.by_kind())

    def by_kind(self) -> tuple[tuple[str, int], ...]:
        """(kind, bytes) of every kind, in the order above."""
        names = (f.name for f in dataclasses.fields(self))
        return tuple((name.removesuffix("_bytes"), getattr(self, name)) for name in names)

    def plus(self, other: Footprint, sign: int = 1) -> Footprint:
        """Kind by kind."""
        mine, others = self.by_kind(), other.by_kind()
        return Footprint(**{f"{k}_bytes": a + sign * b for (k, a), (_, b) in zip(mine, others, strict=True)})

    def minus(self, other: Footprint) -> Footprint:
        """Kind by kind."""
        return self.plus(other, -1)

    def sentence(self) -> str:
        """The kinds that hold anything: `weights 13.5 GiB, activations 2.10 GiB`."""
        shown = (f"{kind.replace('_', ' ')} {format_bytes(n)}" for kind, n in self.by_kind() if n)
        return ", ".join(shown)


def rounded_bytes(size_bytes: int, device: DeviceSpec) -> int:
    """What one tensor takes of a device's memory (the rule above)."""
    if device.is_cpu:
        return size_bytes
    unit_bytes = SEGMENT_BYTES if size_bytes >= OWN_SEGMENT_BYTES else BLOCK_BYTES
    return -(-size_bytes // unit_bytes) * unit_bytes


def amount(tensors: Iterable[tuple[int, int]], device: DeviceSpec) -> Amount:
    """Bytes and rounding of some tensors on a device."""
    size_bytes = taken_bytes = 0
    for each_bytes, count in tensors:
        size_bytes += count * each_bytes
        taken_bytes += count * rounded_bytes(each_bytes, device)
    return Amount(size_bytes=size_bytes, rounding_bytes=taken_bytes - size_bytes)


def exact_bytes(tensors: Iterable[tuple[int, int]]) -> int:
    """Bytes of some tensors without rounding."""
    return sum(each_bytes * count for each_bytes, count in tensors)
