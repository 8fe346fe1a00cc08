"""Runs inside all ranks of a group: times what they do together, through the executor's own collectives.

Of a collective counts the rank that arrived last: it waited for nothing but the exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.executor.comm import Exchange, make_comm
from muxtune.executor.loss import token_losses
from muxtune.executor.megatron import DTYPES
from muxtune.executor.peers import Peers
from muxtune.executor.reference import reference_ns
from muxtune.executor.worker import Worker
from muxtune.profiler.cases import SHARED_LOSS, Case
from muxtune.profiler.clocks import Part, timed


def prepare(worker: Worker, cases: Sequence[Case]) -> None:
    """Build every case; all ranks of the worker's world take part in each."""
    ranks = worker.hello.ranks
    peers = Peers(tp=worker.peers.group(range(ranks)), order=tuple(range(ranks)))
    worker.shared = [  # type: ignore[attr-defined]
        _loss(case, peers, worker) if case.family == SHARED_LOSS else _collective(case, peers, worker) for case in cases
    ]


def measure_round(worker: Worker) -> tuple[int, list[list[Part]]]:
    """(reference GEMM, the parts of every case) on this rank; ranks meet before each case."""
    found: list[list[Part]] = []
    reference = reference_ns(worker.device)
    for run in worker.shared:  # type: ignore[attr-defined]
        run()
        dist.barrier(group=worker.groups["instance"])
        found.append(run())
    return reference, found


def _collective(case: Case, peers: Peers, worker: Worker) -> Callable[[], list[Part]]:
    """Started and waited for at once; `size` counts the whole tensor, also where a rank gives or gets a part."""
    comm, done = make_comm(worker.device), list[Tensor]()
    elements = max(1, case.size[0] // 4)
    ranks = case.shape[0]
    elements = -(-elements // ranks) * ranks
    mine = elements // ranks if case.family == "all_gather" else elements
    given = torch.zeros(mine, device=worker.device)
    exchange = Exchange(kind=case.family, tensor=given, finish=done.append)  # type: ignore[arg-type]

    def run() -> list[Part]:
        part, _ = timed("forward", lambda: comm.start(exchange, peers).settle())
        done.clear()
        return [part]

    return run


def _loss(case: Case, peers: Peers, worker: Worker) -> Callable[[], list[Part]]:
    """Cross entropy over shards of the vocabulary, its meetings included."""
    (tokens,), (width,) = case.size, case.shape
    logits = torch.randn(tokens, width, dtype=DTYPES[case.dtype], device=worker.device).requires_grad_(True)
    labels = torch.zeros(tokens, dtype=torch.long, device=worker.device)
    places = torch.arange(tokens, device=worker.device)

    def loss() -> Tensor:
        each = token_losses(logits, labels, peers, worker.hello.rank, lambda: None)
        return torch.stack([each[places].sum() / 7]).sum()

    def run() -> list[Part]:
        with torch.enable_grad():
            forward, out = timed("forward", loss)
        edge = torch.autograd.graph.get_gradient_edge(out)
        del out
        backward, _ = timed("backward", lambda: torch.autograd.backward((edge,), (torch.ones(()),)))
        logits.grad = None
        return [forward, backward]

    return run
