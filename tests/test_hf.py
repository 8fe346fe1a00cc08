"""Hugging Face formats: random models saved by transformers give equal logits here; adapters written here load in peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muxtune.executor.data import batch_tensors, noise_source
from muxtune.executor.hf.adapters import export_lora
from muxtune.executor.hf.backbone import HfBackbone, fuse_qkv, split_qkv
from muxtune.executor.hf.families import family, family_of
from muxtune.executor.megatron import _cut
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import TaskState, register_task
from muxtune.profiler.cases import one_task_batch
from muxtune.spec.catalogue import pieces_of
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.hf_config import read_model
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'muxtune[hf]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'muxtune[hf]'")

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, rope_theta=5000.0, rms_norm_eps=1e-3),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
}
ROWS, LENGTH = 3, 20


def saved(name: str, folder: Path, shards: str = "5GB") -> Any:
    """A random model of this architecture, biases and norms too, saved to the folder and returned."""
    torch.manual_seed(0)
    with torch.enable_grad():
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def task(targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")) -> Task:
    lora = LoRA(rank=4, alpha=12.0, targets=targets)
    return Task(task_id="t", peft=lora, dataset="d", billed_len_tokens=LENGTH, global_batch_samples=ROWS)


def logits(stage: StageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, logits) of some rows through all pieces but the loss: (rows, length) and (rows, length, vocab)."""
    tensors = batch_tensors(one_task_batch(task(), ROWS, LENGTH), noise_source(stage.model.vocab), stage.device)
    passage = stage.begin(tensors, None)
    for piece in pieces_of(stage.layout, 0, "forward"):
        if piece.name != "head":
            stage.forward_piece(passage, piece, {})
    assert passage.normed is not None
    out = F.linear(passage.normed, stage.gpt.output_layer.weight)[:, 0]
    return tensors.ids.view(ROWS, LENGTH), out.view(ROWS, LENGTH, -1).detach()


def stage_of(folder: Path) -> StageModel:
    model = read_model(folder)
    return StageModel(model, even_layout(model), 0, 0, torch.device("cpu"), seed=0, weights=HfBackbone(folder, model))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(before)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_logits_are_those_of_transformers(name: str, shards: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / name, shards)
    assert (tmp_path / name / "model.safetensors.index.json").exists() == (shards == "20KB")
    ids, mine = logits(stage_of(tmp_path / name))
    expected = theirs(ids).logits
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_exported_adapters_load_in_peft_with_equal_logits(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / name)
    stage = stage_of(tmp_path / name)
    state = register_task(stage, task(), seed=0)
    randomised(state)
    for bank in stage.banks.values():
        bank.bind((("t", 0, ROWS * LENGTH),))
    ids, mine = logits(stage)
    without = theirs(ids).logits
    export_lora(tmp_path / "a", task().peft, stage.model, family(name), [state.state()], str(tmp_path / name))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    torch.testing.assert_close(mine, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    assert (mine - without).abs().max() > 1e-2


def randomised(state: TaskState) -> None:
    """B starts at zero; an adapter that does nothing would prove nothing."""
    for index, parameter in enumerate(state.parameters):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shards_of_two_tensor_parallel_ranks_are_joined(name: str, tmp_path: Path) -> None:
    """Cutting a whole adapter as the ranks hold it, then exporting, gives the file of one rank."""
    saved(name, tmp_path / name)
    stage = stage_of(tmp_path / name)
    state = register_task(stage, task(), seed=0)
    randomised(state)
    whole = state.state()
    layout, model = even_layout(stage.model, tp=2), stage.model
    shards = [
        {key: _shard(key, torch.as_tensor(v), layout, model, r).numpy() for key, v in whole.items()} for r in (0, 1)
    ]
    for folder, parts in (("one", [whole]), ("two", shards)):
        export_lora(tmp_path / folder, task().peft, model, family(name), parts, "base")
    files = [(tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("one", "two")]
    assert files[0] == files[1]
    assert (tmp_path / "one" / "adapter_config.json").read_text() == (
        tmp_path / "two" / "adapter_config.json"
    ).read_text()


def _shard(key: str, tensor: torch.Tensor, layout: Layout, model: Any, rank: int) -> torch.Tensor:
    """B of column-parallel BaseOps is cut like their weight, A of row-parallel ones along its inputs."""
    _, target, side = key.split(".")
    if target in ("qkv", "fc1"):
        return _cut(model, layout, f"linear_{target}.weight", tensor, rank) if side == "b" else tensor
    return tensor.chunk(2, 1)[rank] if side == "a" else tensor


def test_fusing_qkv_can_be_undone() -> None:
    model = model_preset("tiny-test")
    fused = torch.arange(model.qkv_out * 3.0).view(-1, 3)
    assert torch.equal(fuse_qkv(list(split_qkv(fused, model)), model), fused)
    # 4 query heads of 8, 2 key heads: the first group holds query heads 0 and 1, then key head 0, value head 0.
    q, k, v = split_qkv(fused, model)
    assert torch.equal(fused[:16], q[:16])
    assert torch.equal(fused[16:24], k[:8])
    assert torch.equal(fused[24:32], v[:8])


def test_presets_belong_to_architectures() -> None:
    found = {name: family_of(model_preset(name)).name for name in ("llama2-7b", "qwen2.5-7b", "gpt2", "opt-30b")}
    assert found == {"llama2-7b": "llama", "qwen2.5-7b": "qwen2", "gpt2": "gpt2", "opt-30b": "opt"}
    with pytest.raises(InputError, match="gemma-2b: norm=rmsnorm, positions=rope, activation=geglu"):
        family_of(model_preset("gemma-2b"))


class TestRefusals:
    def test_other_shapes_than_planned(self, tmp_path: Path) -> None:
        saved("llama", tmp_path)
        with pytest.raises(InputError, match=r"its model has layers=2, the plan's tiny-llama has 4: plan with"):
            HfBackbone(tmp_path, model_preset("tiny-llama"))

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"holds no config\.json"):
            read_model(tmp_path)
        saved("llama", tmp_path, "20KB")
        model = read_model(tmp_path)
        shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
        shard.rename(tmp_path / "gone")
        with pytest.raises(InputError, match=f"shard {shard.name} is missing"):
            HfBackbone(tmp_path, model)
        (tmp_path / "model.safetensors.index.json").unlink()
        with pytest.raises(InputError, match=r"holds neither model\.safetensors nor"):
            HfBackbone(tmp_path, model)

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        saved("llama", tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
            HfBackbone(tmp_path, read_model(tmp_path))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling 'yarn' is not supported"),
            ({"hidden_act": "tanh"}, "activation 'tanh' is not supported"),
            ({"mlp_bias": True}, "mlp_bias is not supported"),
            ({"dtype": "float64"}, "dtype 'float64': known are float32, float16, bfloat16"),
        ],
    )
    def test_settings_that_would_compute_something_else(
        self, change: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        saved("llama", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=said):
            read_model(tmp_path)

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        with pytest.raises(UnknownKeyError, match=r"architecture 'mamba'.*gpt2, llama"):
            read_model(tmp_path)
