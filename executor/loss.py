"""Cross entropy of each token, over the whole vocabulary or over shards of it: log Σ exp(z) − z[label]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.peers import Peers


def token_losses(logits: Tensor, labels: Tensor, peers: Peers, tp_rank: int, jitter: Callable[[], None]) -> Tensor:
    """Losses (tokens,) from logits (tokens, vocab / tp) and labels (tokens,); `jitter` delays the collectives in tests."""
    if peers.tp is None:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    first = tp_rank * logits.size(1)
    return _ShardedCrossEntropy.apply(logits.float(), labels, first, peers.tp, jitter)  # type: ignore[no-any-return]


class _ShardedCrossEntropy(torch.autograd.Function):
    """Megatron's own works for its one global tensor-parallel group only; instances here each have theirs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: Any, jitter: Callable[[], None]) -> Tensor:
        largest = logits.amax(-1)
        jitter()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest[:, None]
        here = (labels >= first) & (labels < first + logits.size(1))
        places = torch.where(here, labels - first, 0)
        own = torch.where(here, shifted.gather(1, places[:, None])[:, 0], 0)
        exps = shifted.exp_()
        sums = torch.stack((exps.sum(-1), own))
        jitter()
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(exps.div_(sums[0][:, None]), here, places)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        softmax, here, places = ctx.saved_tensors
        gradient = softmax * grads[0][:, None]
        gradient.scatter_add_(1, places[:, None], torch.where(here, -grads[0], 0)[:, None])
        return gradient, None, None, None, None
