"""export: one task of a checkpoint as an adapter that Hugging Face `peft` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muxtune.executor.checkpoint import find_task
from muxtune.executor.hf.adapters import export_lora
from muxtune.executor.hf.families import family, family_of
from muxtune.executor.tensor_files import read_tensors
from muxtune.experiments.commands.inputs import output_folder
from muxtune.experiments.console import render

PARAMETER = "parameter/"


def run(checkpoint: Path, task: str, out: Path, *, backbone: str = "", architecture: str = "") -> dict[str, Any]:
    """Write `out`/adapter_config.json and adapter_model.safetensors.

    `checkpoint` is a run's folder (its newest whole checkpoint is taken, or the task's own where it has left), or one
    checkpoint in it. `backbone` is what the config names as base model; `architecture` is guessed from the shapes.

    Raises:
        InputError: no whole checkpoint, no such task in it, not a LoRA, no such architecture.
    """
    found = find_task(checkpoint, task)
    plan = found.manifest.plan
    layout = next(i.layout for i in plan.instances if task in i.tasks)
    model = plan.workload.model
    shards = []
    for tp_rank in range(layout.tp):
        tensors = read_tensors(found.paths(task, tp_rank))
        shards.append(
            {n.removeprefix(PARAMETER): x.float().numpy() for n, x in tensors.items() if n.startswith(PARAMETER)}
        )
    kind = family(architecture) if architecture else family_of(model)
    folder = output_folder(out)
    export_lora(folder, plan.workload.task(task).peft, model, kind, shards, backbone or model.name)
    steps = next((x.steps for x in found.manifest.done if x.task == task), None)
    return {
        "task": task,
        "checkpoint": str(found.folder),
        "steps": steps,
        "architecture": kind.name,
        "base_model": backbone or model.name,
        "out": str(folder),
    }


def show(body: dict[str, Any]) -> str:
    """What was written, and how to load it."""
    return render(
        f"task {body['task']} after {body['steps']} steps, {body['architecture']}, from {body['checkpoint']}",
        f"load it: peft.PeftModel.from_pretrained(model, {body['out']!r})",
    )
