"""Solo: one rank in this process. Every plan for one device runs on the same backbone, so that a large one is made once.

Instances of a plan share that backbone (equal weights, no second copy): times are those of separate ones, memory is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muxtune.executor.interpreter import RankRun
from muxtune.executor.megatron import DTYPES, LINEARS, Weights
from muxtune.executor.memory import allocation_peak, resident_bytes
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import TaskState, register_task
from muxtune.spec.layout import even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.program import Bound
from muxtune.spec.task import Workload

#: Standard deviation of the executor's initial matrices.
INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class SoloResult:
    """`iterations_ns` of the counted passes; bytes at the peak of one pass, backbone, adapters and states included."""

    iterations_ns: tuple[int, ...]
    peak_bytes: int
    losses: dict[str, tuple[float, ...]]

    @property
    def median_ns(self) -> int:
        """Median of the counted passes."""
        return round(statistics.median(self.iterations_ns))


class DrawnOnDevice:
    """Weights of a backbone: N(0, 0.02) matrices drawn on a device, unit norm weights, zero biases.

    Quick for a large model; other values than the executor's own.
    """

    def __init__(self, model: ModelSpec, device: torch.device) -> None:
        self.model, self.device = model, device

    def full(self, name: str) -> Tensor:
        """A whole tensor by its Megatron name."""
        shape = full_shape(self.model, name)
        if len(shape) > 1:
            return torch.randn(shape, device=self.device, dtype=DTYPES[self.model.dtype]) * INITIAL_STD
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)


def full_shape(model: ModelSpec, name: str) -> tuple[int, ...]:
    """The shape of a backbone's whole tensor by its Megatron name."""
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return model.vocab, model.hidden
    if name == "embedding.position_embeddings.weight":
        return model.max_positions, model.hidden
    target = next((t for t, linear in LINEARS.items() if f".{linear}." in name), None)
    if target is None:
        return (model.hidden,)
    features_in, features_out = model.linear_shape(target)
    return (features_out,) if name.endswith("bias") else (features_out, features_in)


def drawn_weights(model: ModelSpec, device: torch.device) -> DrawnOnDevice | None:
    """Weights drawn where there is a fast device; on a CPU None: the executor's own."""
    return DrawnOnDevice(model, device) if device.type == "cuda" else None


class Solo:
    """A backbone of one stage on one device; use it under `torch.no_grad()`, as worker processes do."""

    def __init__(self, model: ModelSpec, device: torch.device, weights: Weights | None = None, seed: int = 0) -> None:
        self.model, self.device, self.seed = model, device, seed
        self.stage = StageModel(model, even_layout(model), 0, 0, device, seed=seed, weights=weights)

    def register(self, workload: Workload) -> dict[str, TaskState]:
        """Fresh adapters and optimizers for every task; those of earlier plans are forgotten."""
        for bank in self.stage.banks.values():
            bank.adapters.clear()
        return {t.task_id: register_task(self.stage, t, self.seed) for t in workload.tasks}

    def run(self, bounds: Sequence[Bound], warm_up: int = 1) -> SoloResult:
        """Passes over Programs of one plan, the first `warm_up` of them not counted; then one pass that counts memory."""
        plan = bounds[0].plan
        tasks = self.register(plan.workload)
        stages = dict.fromkeys(range(len(plan.instances)), self.stage)
        times: list[int] = []
        for number, bound in enumerate(bounds):
            rank = RankRun(bound, 0, stages, tasks, {}, self.device)
            self.synchronize()
            start_ns = time.perf_counter_ns()
            rank.run()
            self.synchronize()
            if number >= warm_up:
                times.append(time.perf_counter_ns() - start_ns)
        losses = {name: tuple(state.losses) for name, state in tasks.items()}
        resident = resident_bytes(self._resident(tasks))
        peak_bytes = resident + allocation_peak(rank.run, self.device)
        return SoloResult(iterations_ns=tuple(times), peak_bytes=peak_bytes, losses=losses)

    def _resident(self, tasks: dict[str, TaskState]) -> list[Tensor]:
        tensors = list(self.stage.gpt.parameters())
        for state in tasks.values():
            tensors += state.parameters
            tensors += [v for s in state.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return tensors

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
