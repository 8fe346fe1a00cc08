"""The baseline that people run today: real transformers + peft, one LoRA task after the other on the same backbone.

Same samples, same loss, same optimizer and clipping as the executor. LLaMA-shaped backbones only. A fused qkv (fc1) is
three (two) modules there, each with an A of its own: losses equal the executor's at the first step always, at all steps where
the targets are proj and fc2.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.data import BatchTensors, batch_tensors, response_counts, token_source
from muxtune.executor.hf.families import FAMILIES, PARTS
from muxtune.executor.megatron import DTYPES
from muxtune.executor.memory import allocation_peak, resident_bytes
from muxtune.executor.solo import Solo, SoloResult
from muxtune.executor.tasks import TaskState
from muxtune.spec.errors import InputError, NoAnswerError
from muxtune.spec.model import ModelSpec
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.program import Bound
from muxtune.spec.task import Task

LLAMA = FAMILIES["llama"]


def require_baseline(model: ModelSpec) -> None:
    """Refuse what cannot run here.

    Raises:
        NoAnswerError: transformers or peft is absent, or the backbone is not LLaMA-shaped.
    """
    absent = [name for name in ("transformers", "peft", "safetensors") if importlib.util.find_spec(name) is None]
    if absent:
        raise NoAnswerError(f"baseline hf-peft: {' and '.join(absent)} not installed: pip install 'muxtune[hf]'")
    shape = (model.norm, model.activation, model.positions, model.biases, model.tied_embeddings)
    if shape != ("rmsnorm", "swiglu", "rope", "none", False):
        raise NoAnswerError(f"baseline hf-peft: {model.name} is not LLaMA-shaped: only such backbones are mapped here")


def transformers_model(solo: Solo) -> Any:
    """A LlamaForCausalLM with the weights of an executor's stage, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 # heavy, and an extra

    model = solo.model
    fields: dict[str, Any] = {
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rope_base),
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    config = LlamaConfig(**fields)
    with torch.device("meta"):
        found = LlamaForCausalLM(config)
    rotary = type(found.model.rotary_emb)(config)
    found.load_state_dict(_state(dict(solo.stage.gpt.named_parameters()), model), assign=True)
    found.model.rotary_emb = rotary.to(solo.device)
    found.requires_grad_(False)
    return found.to(DTYPES[model.dtype])


def _state(ours: dict[str, Tensor], model: ModelSpec) -> dict[str, Tensor]:
    """The executor's weights under the names that transformers has."""
    from muxtune.executor.hf.backbone import split_qkv  # noqa: PLC0415 # needs safetensors, of an extra

    found = {
        f"{LLAMA.embedding}.weight": ours["embedding.word_embeddings.weight"],
        f"{LLAMA.final_norm}.weight": ours["decoder.final_layernorm.weight"],
        f"{LLAMA.head}.weight": ours["output_layer.weight"],
    }
    for layer, (part, name) in product(range(model.layers), PARTS.items()):
        modules = LLAMA.modules(layer, part)
        fused = ours[f"decoder.layers.{layer}.{name}.weight"]
        parts = split_qkv(fused, model) if part == "qkv" else fused.chunk(len(modules))
        found |= {f"{module}.weight": x.contiguous() for module, x in zip(modules, parts, strict=True)}
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class HfResult:
    """Each task alone, in order: `tasks_ns` are medians of one optimizer step; the peak is the largest of any task."""

    tasks_ns: dict[str, int]
    peak_bytes: int
    losses: dict[str, tuple[float, ...]]

    @property
    def iteration_ns(self) -> int:
        """One optimizer step of every task, one task after the other."""
        return sum(self.tasks_ns.values())


class HfBaseline:
    """transformers + peft on the weights of `solo`, whose own tensors serve where the layouts agree."""

    def __init__(self, solo: Solo) -> None:
        require_baseline(solo.model)
        self.solo = solo
        self.base = transformers_model(solo)

    def run(self, bounds: Sequence[Bound], warm_up: int = 1) -> HfResult:
        """One optimizer step of every task for each Program of a plan with one instance a task (policy hf-peft)."""
        states = self.solo.register(bounds[0].plan.workload)
        found: dict[str, SoloResult] = {}
        for task in bounds[0].plan.workload.tasks:
            found[task.task_id] = self._task(task, states[task.task_id], bounds, warm_up)
        return HfResult(
            tasks_ns={name: x.median_ns for name, x in found.items()},
            peak_bytes=max(x.peak_bytes for x in found.values()),
            losses={name: x.losses[name] for name, x in found.items()},
        )

    def _task(self, task: Task, state: TaskState, bounds: Sequence[Bound], warm_up: int) -> SoloResult:
        lora = self._adapted(task, state)
        parameters = [p for p in lora.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=task.weight_decay, foreach=True)
        losses: list[float] = []
        times: list[int] = []
        for number, bound in enumerate(bounds):
            units, denominator = self._units(bound, task)
            self.solo.synchronize()
            start_ns = time.perf_counter_ns()
            losses.append(_step(lora, units, max(1, denominator), parameters, optimizer, task.clip_norm))
            self.solo.synchronize()
            if number >= warm_up:
                times.append(time.perf_counter_ns() - start_ns)
        resident = [*lora.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
        peak_bytes = resident_bytes([x for x in resident if isinstance(x, Tensor)])
        peak_bytes += allocation_peak(
            lambda: _step(lora, units, max(1, denominator), parameters, optimizer, task.clip_norm), self.solo.device
        )
        self.base = lora.unload()
        return SoloResult(iterations_ns=tuple(times), peak_bytes=peak_bytes, losses={task.task_id: tuple(losses)})

    def _adapted(self, task: Task, state: TaskState) -> Any:
        """The backbone with a task's LoRA, which starts with the executor's own A (and B = 0)."""
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 # heavy, and an extra

        if not isinstance(task.peft, LoRA):
            raise InputError(f"task {task.task_id}: baseline hf-peft runs LoRA, not {task.peft.kind}")
        names = [m.rsplit(".", 1)[1] for target in task.peft.targets for m in LLAMA.layer[target]]
        alpha: Any = task.peft.alpha  # a float there too, whatever the annotation says
        config = LoraConfig(
            r=task.peft.rank,
            lora_alpha=alpha,
            lora_dropout=task.peft.dropout,
            target_modules=names,
            bias="none",
            task_type="CAUSAL_LM",
        )
        found = get_peft_model(self.base, config)
        modules = dict(found.named_modules())
        for (layer, target), adapter in state.adapters.items():
            for module in LLAMA.modules(layer, target):
                place = modules[f"base_model.model.{module}"]
                place.lora_A["default"].weight.data.copy_(adapter.a)
        return found

    def _units(self, bound: Bound, task: Task) -> tuple[list[BatchTensors], int]:
        """A task's micro-batches in order, and the number of response tokens of its global batch."""
        counts = response_counts(bound.program)
        batches = [b for w in bound.program.units for b in w.batches if b.rows[0].task == task.task_id]
        tokens = token_source(bound.plan.workload)
        tensors = [batch_tensors(b, tokens, self.solo.device) for b in batches]
        return tensors, sum(n for (name, _), n in counts.items() if name == task.task_id)


def _step(
    lora: Any,
    units: Sequence[BatchTensors],
    denominator: int,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
) -> float:
    """Accumulate the gradients of all micro-batches, clip, step; returns the loss of the global batch.

    Rows are padded on the right: causal attention of a real token never sees padding, so that no mask is needed.
    """
    total = torch.zeros((), device=parameters[0].device)
    with torch.enable_grad():
        for unit in units:
            rows = len(unit.batch.rows)
            logits = lora(input_ids=unit.ids.view(rows, -1), use_cache=False).logits
            each = F.cross_entropy(logits.flatten(0, 1).float(), unit.labels, reduction="none")
            loss = sum(each[places].sum() for _, places in unit.targets) / denominator  # type: ignore[union-attr]
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)
