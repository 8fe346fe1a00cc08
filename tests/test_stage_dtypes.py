"""Half-precision backbones: every weight and the stream in the model's dtype, adapters in fp32, losses near those of fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from muxtune.executor.data import batch_tensors, noise_source
from muxtune.executor.megatron import DTYPES
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import register_task
from muxtune.profiler.cases import passage_batch
from muxtune.spec.layout import even_layout
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task

TASK = Task(task_id="a", peft=LoRA(rank=4), billed_len_tokens=32, global_batch_samples=1, dataset="sst2")


def passed(name: str, dtype: Literal["fp32", "fp16", "bf16"]) -> float:
    """The loss of one batch forward and back; gradients must be there and finite."""
    model = replace(model_preset(name), dtype=dtype)
    with torch.no_grad():
        stage = StageModel(model, even_layout(model, pp=1), 0, 0, torch.device("cpu"), seed=0)
        state = register_task(stage, TASK, seed=0)
        passage = stage.begin(batch_tensors(passage_batch(TASK, 32), noise_source(model.vocab), stage.device), None)
        for subgraph in stage.subgraphs["forward"]:
            stage.forward(passage, subgraph.index, {"a": 31})
        assert {p.dtype for p in stage.gpt.parameters()} == {DTYPES[dtype]}
        for subgraph in stage.subgraphs["backward"]:
            stage.backward(passage, subgraph.index)
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in state.parameters)
    return float(passage.losses["a"])


@pytest.mark.parametrize("name", ["tiny-test", "tiny-gpt2"])
def test_half_precision_backbones_train(name: str) -> None:
    exact = passed(name, "fp32")
    assert passed(name, "fp16") == pytest.approx(exact, rel=1e-3)
    assert passed(name, "bf16") == pytest.approx(exact, rel=1e-2)
