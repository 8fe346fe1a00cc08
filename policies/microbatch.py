"""What a micro-batch of one hTask, and a unit of several, cost on each stage."""

from __future__ import annotations

from muxtune.spec.noun import noun


@noun
class MicrobatchCost:
    """One micro-batch of an hTask, or one chunk of it, on each stage.

    `held_bytes` stay from its forward to its backward (a received activation included), `again_bytes` are a layer that its
    backward has made again, `working_bytes` the transient beside them, all as the allocator rounds them; `message_bytes` is
    what it sends to a neighbouring stage.
    """

    forward_ns: tuple[int, ...]
    backward_ns: tuple[int, ...]
    held_bytes: tuple[int, ...]
    again_bytes: tuple[int, ...]
    working_bytes: tuple[int, ...]
    message_bytes: int

    @property
    def pair_ns(self) -> tuple[int, ...]:
        """2·L^s: forward and backward on each stage."""
        return tuple(f + b for f, b in zip(self.forward_ns, self.backward_ns, strict=True))


@noun
class UnitCost:
    """(A chunk of) a unit on each stage: what it holds from forward to backward, the bytes beside that, and its clocks."""

    held_bytes: tuple[int, ...]
    transient_bytes: tuple[int, ...]
    forward_ns: tuple[int, ...]
    backward_ns: tuple[int, ...]
