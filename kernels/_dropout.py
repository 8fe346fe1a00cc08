"""Counter-based dropout: whether an element is kept is a hash of (key, step, token number, column), of nothing else.

v = mix(token ^ column), token = mix(mix(slot ^ seed) + position), column = mix(c · φ + key); kept where v ≥ rate · 2³². mix is
MurmurHash3's 32-bit finaliser. So masks do not depend on grouping, order or shards, and a backward draws them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """One adapter's dropout in one optimizer step; `first_column` is the number of x's first column in the whole input."""

    rate: float
    key: int
    step: int
    first_column: int = 0

    @property
    def threshold(self) -> int:
        """Hashes below this are dropped."""
        return round(self.rate * 2**32)

    @property
    def gain(self) -> float:
        """1 / (1 − rate), by which kept elements grow."""
        return 1.0 / (1.0 - self.rate)


def mix(v: Tensor) -> Tensor:
    """The finaliser on 32-bit numbers kept in int64 (products wrap, the low 32 bits are right)."""
    v = ((v ^ (v >> 16)) * 0x85EBCA6B) & MASK
    v = ((v ^ (v >> 13)) * 0xC2B2AE35) & MASK
    return v ^ (v >> 16)


def token_hashes(dropout: Dropout, counters: Tensor) -> Tensor:
    """Hash of each token, (tokens,) int64 below 2³²; `counters` (tokens,) is slot · 2³² + position."""
    seed = mix(torch.tensor((dropout.key ^ (dropout.step * GOLDEN)) & MASK, device=counters.device))
    return mix((mix((counters >> 32) ^ seed) + (counters & MASK)) & MASK)


def column_hashes(dropout: Dropout, columns: int, device: torch.device) -> Tensor:
    """Hash of each column of x, (columns,) int64 below 2³²."""
    numbers = torch.arange(dropout.first_column, dropout.first_column + columns, device=device)
    return mix((numbers * GOLDEN + dropout.key) & MASK)


def kept(dropout: Dropout, counters: Tensor, columns: int) -> Tensor:
    """Which elements stay, (tokens, columns) bool."""
    tokens = token_hashes(dropout, counters)
    return mix(tokens[:, None] ^ column_hashes(dropout, columns, counters.device)[None]) >= dropout.threshold


def drop(x: Tensor, mask: Tensor, dropout: Dropout) -> Tensor:
    """x where kept, grown by the gain, 0 elsewhere: selected, so that a NaN that is dropped is gone."""
    return torch.where(mask, x * dropout.gain, torch.zeros((), dtype=x.dtype, device=x.device))
