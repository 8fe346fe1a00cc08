"""Process groups of an instance's ranks: tensor-parallel peers, replicas, and the ranks of one replica; sums of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.spec.plan import Instance


class Alone:
    """Stands for the process group of a rank without tensor-parallel peers: Megatron asks it for rank and size only."""

    def rank(self) -> int:
        """0."""
        return 0

    def size(self) -> int:
        """1."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Groups of one rank in one instance; None where the group would have one member.

    `order` has the tp index of each member of `tp`, in group order: torch sorts the members, a plan need not.
    """

    tp: Any = None
    order: tuple[int, ...] = (0,)
    dp: Any = None
    replica: Any = None


ALONE = Peers()


class PeerGroups:
    """Makes process groups, each set of ranks once. Every rank of the world asks for the same ones in the same order."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.known: dict[tuple[int, ...], Any] = {}

    def group(self, ranks: Sequence[int]) -> Any:
        """The group of some world ranks, None for one rank."""
        members = tuple(sorted(ranks))
        if len(members) > 1 and members not in self.known:
            self.known[members] = dist.new_group(list(members), **self.options)
        return self.known.get(members)

    def of(self, instance: Instance, rank: int) -> Peers:
        """Groups of a world rank in an instance; those of all its ranks are made, whether or not this rank is one."""
        layout, devices = instance.layout, instance.devices
        width = layout.tp * layout.pp
        found = ALONE
        for local, device in enumerate(devices):
            mates = [devices[r] for r in layout.stage_peers(local)]
            replica = [devices[layout.replica_of(local) * width + r] for r in range(width)]
            peers = Peers(
                tp=self.group(mates),
                order=tuple(mates.index(device) for device in sorted(mates)),
                dp=self.group([devices[r] for r in layout.replica_peers(local)]),
                replica=self.group(replica),
            )
            if device == rank:
                found = peers
        return found


def sum_gradients(peers: Peers, parameters: Sequence[torch.nn.Parameter], shared: Sequence[torch.nn.Parameter]) -> None:
    """Sum a task's gradients over the ranks that hold the same parameters: `shared` over tp, then all over the replicas.

    A replica that computed none of the task's samples adds zeros.
    """
    if peers.tp is not None:
        _sum_flat([p.grad for p in shared if p.grad is not None], peers.tp)
    if peers.dp is not None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        _sum_flat([p.grad for p in parameters if p.grad is not None], peers.dp)


def _sum_flat(gradients: Sequence[Tensor], group: Any) -> None:
    """One all-reduce for all tensors."""
    if gradients:
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
