"""Point-to-point channels: tagged asynchronous sends, receives posted one unit ahead, FIFO per edge and payload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.spec.program import Instruction, Program


class Channels:
    """The channels of one rank for one Program. Activations and gradients travel in process groups of their own."""

    def __init__(
        self,
        instructions: Sequence[Instruction],
        groups: dict[str, Any],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        jitter: Callable[[], None] = lambda: None,
    ) -> None:
        self.jitter = jitter
        self.groups, self.width, self.dtype, self.device = groups, width, dtype, device
        self.queues: dict[tuple[int, str], list[Instruction]] = {}
        self.posted: dict[tuple[int, str], tuple[Instruction, Tensor, Any] | None] = {}
        self.sent: list[tuple[Any, Tensor]] = []
        for x in instructions:
            if x.op == "recv":
                self.queues.setdefault(self._edge(x), []).append(x)
        for edge in self.queues:
            self.queues[edge].reverse()
            self._post(edge)

    def _edge(self, x: Instruction) -> tuple[int, str]:
        assert x.peer is not None
        assert x.payload is not None
        return x.peer, x.payload

    def _post(self, edge: tuple[int, str]) -> None:
        if not self.queues[edge]:
            self.posted[edge] = None
            return
        x = self.queues[edge].pop()
        element = torch.empty((), dtype=self.dtype).element_size()
        buffer = torch.empty(x.size_bytes // element // self.width, 1, self.width, dtype=self.dtype, device=self.device)
        work = dist.irecv(buffer, src=edge[0], group=self.groups[edge[1]], tag=x.tag or 0)
        self.posted[edge] = (x, buffer, work)

    def receive(self, x: Instruction) -> Tensor:
        """Wait for a message and post the next receive of its channel; (tokens, 1, hidden)."""
        edge = self._edge(x)
        posted = self.posted[edge]
        assert posted is not None
        assert posted[0].tag == x.tag
        self.jitter()
        posted[2].wait()
        self._post(edge)
        return posted[1]

    def send(self, x: Instruction, message: Tensor) -> None:
        """Send without waiting; the tensor is kept until it has left."""
        peer, payload = self._edge(x)
        message = message.contiguous()
        self.jitter()
        self.sent = [(work, kept) for work, kept in self.sent if not work.is_completed()]
        self.sent.append((dist.isend(message, dst=peer, group=self.groups[payload], tag=x.tag or 0), message))

    def finish(self) -> None:
        """Wait until every message has left."""
        for work, _ in self.sent:
            work.wait()
        self.sent = []


def connect(program: Program, rank: int, groups: dict[str, Any], device: torch.device) -> None:
    """Send one number along every channel, edge after edge in one order on all ranks.

    NCCL makes a pair's communicator at its first message, and both ends must be there: receives posted ahead would wait for
    each other.
    """
    edges = sorted(
        {(x.payload or "", r.rank, x.peer or 0) for r in program.ranks for x in r.instructions if x.op == "send"}
    )
    for payload, source, target in edges:
        token = torch.zeros(1, device=device)
        if rank == source:
            dist.send(token, dst=target, group=groups[payload])
        elif rank == target:
            dist.recv(token, src=source, group=groups[payload])
