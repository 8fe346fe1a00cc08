"""What the steps of the GPU suite share: device, folder, deadline, how large everything is, and the backbones made so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from muxtune.executor.hf_baseline import HfBaseline
from muxtune.executor.solo import Solo, drawn_weights
from muxtune.spec.cluster import Cluster, device_presets, parse_cluster
from muxtune.spec.errors import NoAnswerError
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import ModelSpec, model_preset
from muxtune.spec.noun import noun
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

MIXED, UNIFORM = ("sst2", "openbookqa", "rte"), ("sst2",)
MICROBATCHES = 4
RANK = 16


@noun
class Scale:
    """How large the suite is. `samples` are those of a task in one micro-batch, `tokens` the most in one operator."""

    head_model: ModelSpec
    operator_models: tuple[ModelSpec, ...]
    tensor_degrees: tuple[int, ...]
    tasks: int
    many_tasks: int
    sweep_tasks: tuple[int, ...]
    samples: int
    large_samples: int
    rounds: int
    operator_rounds: int
    tokens: int
    kernel_features: tuple[tuple[int, int], ...]
    policies: tuple[str, ...] = ()


def full_scale() -> Scale:
    """What DESIGN's targets speak of."""
    shapes = tuple(replace(model_preset(name), layers=2) for name in ("llama2-7b", "llama3-8b", "gpt3-2.7b"))
    return Scale(
        head_model=model_preset("llama2-7b"),
        operator_models=shapes,
        tensor_degrees=(1, 2, 4),
        tasks=8,
        many_tasks=32,
        sweep_tasks=(1, 2, 4, 16, 32),
        samples=4,
        large_samples=32,
        rounds=5,
        operator_rounds=3,
        tokens=8192,
        kernel_features=((4096, 4096), (4096, 11008), (11008, 4096)),
    )


def tiny_scale() -> Scale:
    """The same steps in seconds on one core."""
    model = replace(model_preset("tiny-test"), max_positions=128)
    return Scale(
        head_model=model,
        operator_models=(replace(model, name="tiny-shape"),),
        tensor_degrees=(1, 2),
        tasks=2,
        many_tasks=3,
        sweep_tasks=(1,),
        samples=1,
        large_samples=2,
        rounds=1,
        operator_rounds=1,
        tokens=128,
        kernel_features=((32, 48),),
        policies=("hf-peft", "sl-peft", "muxtune"),
    )


@dataclass
class Context:
    """State of one run. `current` is the result of the step that runs; `save` writes everything so far."""

    device: torch.device
    out: Path
    scale: Scale
    deadline_s: float
    current: dict[str, Any] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None
    _solo: Solo | None = None
    _baseline: HfBaseline | None = None

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline_s - time.monotonic()

    @property
    def device_name(self) -> str:
        """The name that the driver gives; `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def cluster(self) -> Cluster:
        """One device of this kind, from its preset.

        Raises:
            NoAnswerError: no preset has its name in it.
        """
        return parse_cluster("cpu" if self.device.type == "cpu" else f"1x{preset_of(self.device_name)}")

    def solo(self) -> Solo:
        """The backbone of the head-to-head, made once."""
        if self._solo is None:
            weights = drawn_weights(self.scale.head_model, self.device)
            self._solo = Solo(self.scale.head_model, self.device, weights)
        return self._solo

    def baseline(self) -> HfBaseline:
        """transformers + peft on the same weights, made once."""
        if self._baseline is None:
            self._baseline = HfBaseline(self.solo())
        return self._baseline


def preset_of(device_name: str) -> str:
    """The device preset whose name stands in a driver's device name.

    Raises:
        NoAnswerError: none does.
    """
    squeezed = device_name.replace(" ", "").lower()
    found = [name for name in device_presets() if name != "cpu" and name.lower() in squeezed]
    if not found:
        raise NoAnswerError(f"{device_name}: no device preset has this name: add one to spec/data/devices.json")
    return max(found, key=len)


def suite_workload(model: ModelSpec, tasks: int, datasets: tuple[str, ...], samples: int) -> Workload:
    """Equal LoRA tasks whose data sets repeat in turn; a global batch is MICROBATCHES · `samples`."""
    tables = {name: embedded_length(name) for name in datasets[:tasks]}
    made = tuple(
        Task(
            task_id=f"t{i:02}",
            peft=LoRA(rank=min(RANK, model.head_dim)),
            dataset=datasets[i % len(datasets)],
            billed_len_tokens=min(tables[datasets[i % len(datasets)]].covered_length(), model.max_positions),
            global_batch_samples=MICROBATCHES * samples,
        )
        for i in range(tasks)
    )
    name = f"{tasks} {'mixed' if len(datasets) > 1 else 'uniform'} tasks of {samples}"
    return Workload(name=name, model=model, datasets=tuple(tables.values()), tasks=made)
