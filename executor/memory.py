"""Bytes that a run really allocates: allocator peak on CUDA, a replay of torch's allocation events on CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from muxtune.executor.stage import StageModel


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def backbone_digest(stage: StageModel) -> str:
    """SHA-256 over the bytes of every weight of a stage, without the adapters: equal only where no bit has moved."""
    found = hashlib.sha256()
    for name, weight in sorted(stage.gpt.named_parameters()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def allocation_peak(run: Callable[[], object], device: torch.device) -> int:
    """Highest number of bytes allocated during `run` beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    kineto = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [(e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]"]
    in_use = peak = 0
    for _, size_bytes in sorted(events, key=lambda e: e[0]):
        in_use += size_bytes
        peak = max(peak, in_use)
    return peak
