"""A task's training state on one rank as a safetensors file: `parameter/`, `buffer/`, `moment/` and `history/` tensors.

Names are by global layer, so that a file of one pipeline layout is read under another; tensor-parallel shards stay shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from muxtune.executor.checkpoint import FileRecord, file_name
from muxtune.executor.reports import HISTORY, StepReport, step_reports
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_bytes
from muxtune.spec.task import Task

if TYPE_CHECKING:  # it brings Megatron, which who only reads files need not wait for
    from muxtune.executor.tasks import TaskState


def task_tensors(state: TaskState) -> dict[str, Tensor]:
    """Everything that a task's next step depends on, and its curve so far."""
    found = {f"parameter/{name}": p.detach() for name, p in state.named()}
    found |= {f"buffer/{name}": b for name, b in _buffers(state)}
    found |= {f"moment/{name}": v for name, v in state.moments().items()}
    found |= {f"history/{n}": torch.tensor(getattr(state, n), dtype=torch.float64) for n in HISTORY}
    found["history/scale"] = torch.tensor([state.loss_scale, state.good_steps], dtype=torch.float64)
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators on this rank."""
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put torch's generators back."""
    if "cpu" in tensors:
        torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _buffers(state: TaskState) -> Iterator[tuple[str, Tensor]]:
    for (layer, target), adapter in sorted(state.adapters.items()):
        for name, buffer in adapter.named_buffers():
            yield f"{layer}.{target}.{name}", buffer


def write_tensors(
    folder: Path, task: str, tensors: dict[str, Tensor], rank: int, shard: tuple[int, int] = (0, 1)
) -> FileRecord:
    """Write one file: temporary name, fsync, rename; `task` is empty for the rank's generators, `shard` (tp rank, tp)."""
    tp_rank, tp = shard
    metadata = {"task": task, "rank": str(rank), "tp_rank": str(tp_rank), "tp": str(tp)}
    content = save(tensors, metadata)
    name = file_name(task, rank)
    write_bytes(folder / name, content)
    digest = hashlib.sha256(content).hexdigest()
    return FileRecord(name=name, task=task, rank=rank, tp_rank=tp_rank, tp=tp, size_bytes=len(content), sha256=digest)


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of some files; of a history the longest is kept (losses are known on the last stage only).

    Raises:
        InputError: a file that is no safetensors file.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # the file is no mapping
                    tensor = file.get_tensor(name)
                    if name not in found or tensor.numel() > found[name].numel():
                        found[name] = tensor
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: no safetensors file: {error}: give a whole checkpoint") from error
    return found


def restore_task(state: TaskState, tensors: dict[str, Tensor]) -> None:
    """Put a task back where its files left it.

    Raises:
        InputError: a parameter is missing or of another shape: the adapter was changed.
    """
    for kind, pairs in (("parameter", state.named()), ("buffer", _buffers(state))):
        for name, target in pairs:
            source = tensors.get(f"{kind}/{name}")
            if source is None or source.shape != target.shape:
                has = "is not there" if source is None else f"has shape {tuple(source.shape)}"
                raise InputError(
                    f"task {state.task.task_id}: {kind}/{name} {has} in the checkpoint, wanted {tuple(target.shape)}: "
                    "keep the task's peft and tp as they were"
                )
            target.data.copy_(source)
    for name, parameter in state.named():
        moments = {
            key.split("/", 2)[1]: value.to(parameter.device) if value.shape == parameter.shape else value
            for key, value in tensors.items()
            if key.startswith("moment/") and key.split("/", 2)[2] == name
        }
        if moments:
            state.optimizer.state[parameter] = moments
    history = _history(tensors)
    state.losses, state.gradient_norms, state.scales = (history[n] for n in HISTORY[:3])
    state.skips = [int(step) for step in history["skips"]]
    scale, good_steps = tensors["history/scale"].tolist()
    state.loss_scale, state.good_steps = scale, int(good_steps)


def _history(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: tensors[f"history/{name}"].tolist() for name in HISTORY}


def history_reports(task: Task, tensors: dict[str, Tensor]) -> list[StepReport]:
    """The steps of a task that is only on disk."""
    return step_reports(task, _history(tensors), 0)
