"""Models and the operator catalogue: known totals, flops, gradients that are not needed, subgraph cuts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.spec.align import Batch, Row
from muxtune.spec.catalogue import StageContext, adapter_sizes, stage_ops, stage_pieces, stage_subgraphs, subgraph_ops
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.model import ModelSpec, model_preset, model_presets
from muxtune.spec.ops import ADAPTERS, FAMILIES, attention, linear, lora
from muxtune.spec.peft import PeftSpec
from muxtune.spec.peft.bottleneck import Bottleneck
from muxtune.spec.peft.dora import DoRA
from muxtune.spec.peft.ia3 import IA3
from muxtune.spec.peft.lora import LoRA

#: Sizes of the published checkpoints (tied output layers counted once).
KNOWN = {
    "gpt2": 124_439_808,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "mistral-7b": 7_241_732_096,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_published_models(name: str) -> None:
    assert model_preset(name).parameters == KNOWN[name]


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(UnknownKeyError, match=r"unknown model 'llama9': known are gemma-2b, .*tiny-test"):
        model_preset("llama9")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, "layers=0: must be at least 1"), ({"kv_heads": 5}, "kv_heads=5: must divide heads=6")],
)
def test_wrong_models(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(model_preset("tiny-llama"), **change)


def test_even_layout_spares_embedding_and_head() -> None:
    model = replace(model_preset("tiny-llama"), layers=10)
    assert even_layout(model, pp=4).layers_per_stage == (2, 3, 3, 2)
    assert even_layout(model, pp=5).layers_per_stage == (2,) * 5
    assert even_layout(model, pp=3).layers_per_stage == (3, 4, 3)
    with pytest.raises(InputError, match="pp=11: model tiny-llama has only 10 layers; use pp <= 10"):
        even_layout(model, pp=11)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_ranks_and_stages(tp: int, pp: int, dp: int) -> None:
    layout = Layout(tp=tp, pp=pp, dp=dp, layers_per_stage=tuple(range(1, pp + 1)))
    assert [x for s in range(pp) for x in layout.layers_of(s)] == list(range(sum(layout.layers_per_stage)))
    for rank in range(layout.ranks):
        for stage in range(pp):
            other = layout.rank_at(rank, stage)
            assert 0 <= other < layout.ranks
            assert layout.stage_of(other) == stage
            assert layout.rank_at(other, layout.stage_of(rank)) == rank


def batch(*rows: tuple[str, int]) -> Batch:
    made = (
        Row(task=t, slot=i, sample=0, prompt_tokens=n - 1, response_tokens=1, length_tokens=n)
        for i, (t, n) in enumerate(rows)
    )
    return Batch(htask=0, rows=tuple(made))


def context(model: ModelSpec, stage: int = 0, *, tp: int = 1, pp: int = 1, **targets: tuple[str, ...]) -> StageContext:
    adapters = tuple((t, LoRA(rank=4, targets=x)) for t, x in (targets or {"a": ("qkv", "proj", "fc1", "fc2")}).items())
    return StageContext(model=model, layout=even_layout(model, tp=tp, pp=pp), stage=stage, adapters=adapters)


SHARDED = [
    (name, tp, pp)
    for name, model in sorted(model_presets().items())
    for tp, pp in ((1, 1), (1, 2), (2, 1))
    if not model.kv_heads % tp and not model.vocab % tp
]


@pytest.mark.parametrize(("name", "tp", "pp"), SHARDED)
def test_linear_flops_are_2_parameters_tokens(name: str, tp: int, pp: int) -> None:
    model = model_preset(name)
    work = batch(("a", 8), ("a", 8))
    flops = sum(
        op.flops
        for stage in range(pp)
        for _, forward, _ in stage_ops(context(model, stage, tp=tp, pp=pp), work)
        for op in forward
        if op.family == "linear"
    )
    weights = model.layers * sum(i * o for i, o in map(model.linear_shape, ("qkv", "proj", "fc1", "fc2")))
    assert flops * tp == 2 * work.tokens * (weights + model.vocab * model.hidden)


def test_forward_is_about_2_parameters_tokens() -> None:
    """The rule of thumb for a 7B model at a short length: the embedding, 2 % of it, does no flops."""
    model = model_preset("llama2-7b")
    work = batch(("a", 64))
    base = (op for _, f, _ in stage_ops(context(model), work) for op in f if op.family in ("linear", "attention"))
    assert sum(op.flops for op in base) == pytest.approx(2 * model.parameters * 64, rel=0.025)


def test_flops_by_hand() -> None:
    # 10 tokens, 3 → 5 features: 2·10·15. LoRA rank 2: 2·10·2·8; backward twice that, without dx 2·10·2·3 less.
    assert linear(10, (3, 5), False, "forward", "fp32", 4).flops == 300
    assert linear(10, (3, 5), False, "backward", "fp32", 4).flops == 300
    assert [lora(10, (3, 5), 2, d, "fp32", 4).flops for d in ("forward", "backward", "weights")] == [320, 640, 520]
    # 2 rows of 4 tokens, 3 heads of 8: half of 2·2·16·24 for each of QKᵀ and PV; backward 2.5 times.
    assert [attention(2, 4, (3, 1, 8), d, "fp32", 4).flops for d in ("forward", "backward")] == [1536, 3840]


def directions(found: StageContext, work: Batch) -> list[tuple[str, str]]:
    """(family, direction) of the first layer's backward, in forward order."""
    first = found.layout.layers_of(found.stage)[0]
    rows = [b for piece, _, b in stage_ops(found, work) if piece.layer == first]
    return [(op.family, op.direction) for b in rows for op in reversed(b)]


def test_first_adapted_linear_needs_no_input_gradient() -> None:
    model, work = model_preset("tiny-llama"), batch(("a", 8), ("b", 8))
    all_targets = ("qkv", "proj", "fc1", "fc2")
    first = directions(context(model, 0, pp=2, a=all_targets, b=all_targets), work)
    # Nothing above qkv; both adapters on it have weight gradients only; from there on everything flows.
    assert first[:3] == [("lora", "weights"), ("lora", "weights"), ("rope", "backward")]
    assert not any(d == "weights" for _, d in first[2:])
    second = directions(context(model, 1, pp=2, a=all_targets, b=all_targets), work)
    assert [f for f, _ in second[:5]] == ["rmsnorm", "linear", "lora", "lora", "rope"]
    assert {d for _, d in second} == {"backward"}


def test_a_late_first_adapter_frees_what_stands_above() -> None:
    work = batch(("a", 8))
    found = directions(context(model_preset("tiny-llama"), a=("fc2",)), work)
    assert found == [("lora", "weights"), ("mlp_overhead", "backward")]


def test_a_neighbour_that_starts_earlier_makes_gradients_flow() -> None:
    work = batch(("a", 8), ("b", 8))
    found = directions(context(model_preset("tiny-llama"), a=("fc2",), b=("qkv",)), work)
    assert found[0] == ("lora", "weights")
    assert found[-2:] == [("lora", "backward"), ("mlp_overhead", "backward")]


def hung(tp: int, **methods: PeftSpec) -> StageContext:
    """tiny-llama on one stage with these adapters."""
    model = model_preset("tiny-llama")
    return StageContext(model=model, layout=even_layout(model, tp=tp), stage=0, adapters=tuple(methods.items()))


def test_an_adapter_that_feeds_its_linear_makes_its_gradient_flow() -> None:
    """(IA)³ beside fc2 stands before it: the linear and the LoRA behind it turn in full, where LoRA alone would not."""
    found = directions(hung(1, a=LoRA(targets=("fc2",)), b=IA3(targets=("fc2",))), batch(("a", 8), ("b", 8)))
    assert found == [("ia3", "weights"), ("linear", "backward"), ("lora", "backward"), ("mlp_overhead", "backward")]


def test_sums_inside_adapters_stand_behind_their_method_and_only_under_tp() -> None:
    """Two bottlenecks of rank 4 on fc2 and a DoRA: all of a method, then its sums; DoRA's backward has none."""
    small = {"a": Bottleneck(rank=4, targets=("fc2",)), "b": Bottleneck(rank=2, targets=("fc2",))}
    work = batch(("a", 8), ("c", 8), ("b", 16))
    for tp, sums in ((1, []), (2, [8 * 4 * 4, 16 * 2 * 4])):
        rows = stage_ops(hung(tp, **small, c=DoRA(rank=2, targets=("fc2",))), work)
        forward, backward = next((f, b) for piece, f, b in rows if piece.name == "mlp")
        mine = [op for op in forward if op.family in ADAPTERS]
        norms = [192 * 4] if tp == 2 else []
        assert [op.family for op in mine] == ["bottleneck"] * 2 + ["adapter_sum"] * len(sums) + ["dora"] + [
            "adapter_sum"
        ] * len(norms)
        assert [op.size[0] for op in mine if op.family == "adapter_sum"] == sums + norms
        turned = [op for op in backward if op.family in ADAPTERS]
        assert [op.size[0] for op in turned if op.family == "adapter_sum"] == sums[::-1]
        assert {op.direction for op in turned} == {"weights"}
        # Down 2·8·4·192, up the same; beside a row-parallel linear each of two ranks adds up half of the tokens.
        assert mine[0].flops == 2 * 8 * 4 * 192 + 2 * (8 // tp) * 4 * 192


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_subgraphs_hold_each_piece_once(direction: Any, pp: int) -> None:
    layout = even_layout(model_preset("tiny-llama"), pp=pp)
    for stage in range(pp):
        pieces = [p for g in stage_subgraphs(layout, stage, direction) for p in g.pieces]
        wanted = [p for p in stage_pieces(layout, stage) if direction == "forward" or p.name != "embed"]
        assert pieces == (wanted if direction == "forward" else wanted[::-1])


def names(layout: Layout, stage: int, direction: Any) -> list[str]:
    return [g.name for g in stage_subgraphs(layout, stage, direction)]


def test_cuts_by_hand() -> None:
    one = Layout(tp=1, pp=2, layers_per_stage=(1, 1))
    assert names(one, 0, "forward") == ["embed", "layer0.attention", "layer0.mlp", "exit"]
    assert names(one, 1, "forward") == ["layer1.attention", "layer1.mlp", "head"]
    assert names(one, 0, "backward") == ["layer0.mlp", "layer0.attention", "layer0.norm1"]
    assert names(one, 1, "backward") == ["head", "layer1.mlp", "layer1.attention", "layer1.norm1"]


def test_tp_adds_a_collective_to_each_cut() -> None:
    one, two = (Layout(tp=tp, pp=2, layers_per_stage=(1, 1)) for tp in (1, 2))
    assert names(two, 1, "forward") == [
        "layer1.attention",
        "layer1.attention all_reduce",
        "layer1.mlp",
        "layer1.mlp all_reduce",
        "head",
    ]
    assert names(two, 1, "backward")[:4] == ["head", "head all_reduce", "layer1.mlp", "layer1.mlp all_reduce"]
    for direction in ("forward", "backward"):
        for stage in (0, 1):
            compute = [n for n in names(two, stage, direction) if not n.endswith("all_reduce")]
            assert compute == names(one, stage, direction)
            assert [g.index for g in stage_subgraphs(two, stage, direction)] == list(  # type: ignore[arg-type]
                range(len(names(two, stage, direction)))
            )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_subgraph_operators_are_the_stage_operators(tp: int, direction: Any) -> None:
    work = batch(("a", 8), ("a", 4))
    found = context(model_preset("tiny-llama"), 1, tp=tp, pp=2)
    groups = subgraph_ops(found, work, direction)
    flat = [op for g in groups for op in g if op.family != "all_reduce"]
    rows = stage_ops(found, work)
    wanted = [
        op
        for _, f, b in (rows if direction == "forward" else rows[::-1])
        for op in (f if direction == "forward" else b)
    ]
    assert flat == wanted
    messages = [op for g in groups for op in g if op.family == "all_reduce"]
    assert {op.size for op in messages} <= {(12 * 192 * 4,)}
    assert bool(messages) == (tp > 1)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_operators_follow_their_family(name: str) -> None:
    for _, forward, backward in stage_ops(context(model_preset(name)), batch(("a", 8))):
        for op in (*forward, *backward):
            assert (len(op.size), len(op.shape)) == (len(FAMILIES[op.family].size), len(FAMILIES[op.family].shape))


def test_adapter_parameters_by_hand() -> None:
    # tiny-llama: qkv 192 → 320, proj 192 → 192, fc1 192 → 1024, fc2 512 → 192; rank 4, 4 layers.
    found = context(model_preset("tiny-llama"))
    per_layer = 4 * ((192 + 320) + (192 + 192) + (192 + 1024) + (512 + 192))
    assert adapter_sizes(found, "a") == (4 * per_layer, 4 * 4 * 2)


class TestRecomputation:
    """`recompute: full`: the backward of a layer runs its forward again first."""

    @pytest.mark.parametrize("tp", [1, 2])
    @pytest.mark.parametrize("stage", [0, 1])
    def test_the_backward_has_one_more_forward_of_every_layer(self, stage: int, tp: int) -> None:
        """As a multiset: backward operators with recomputation = without + the layers' forward operators."""
        plain = context(model_preset("tiny-llama"), stage, tp=tp, pp=2, a=("qkv", "fc2"), b=("proj",))
        full = replace(plain, layout=replace(plain.layout, recompute="full"))
        work = batch(("a", 8), ("b", 16))
        layers = [op for piece, forward, _ in stage_ops(plain, work) if piece.layer >= 0 for op in forward]
        before, after = (
            [op for group in subgraph_ops(c, work, "backward") for op in group if op.family != "all_reduce"]
            for c in (plain, full)
        )
        assert Counter(after) == Counter(before) + Counter(layers)
        assert sum(op.flops for op in after) == sum(op.flops for op in (*before, *layers))
        assert subgraph_ops(full, work, "forward") == subgraph_ops(plain, work, "forward")

    def test_a_layer_by_hand(self) -> None:
        """Stage 1 of 4 holds layer 1 alone, tp=2: the sum inside the layer comes again, that of its output has no reader."""
        layout = replace(even_layout(model_preset("tiny-llama"), tp=2, pp=4), recompute="full")
        names = [s.name for s in stage_subgraphs(layout, 1, "backward")]
        assert names == [
            "layer1.attention again",
            "layer1.attention again all_reduce",
            "layer1.mlp",
            "layer1.mlp all_reduce",
            "layer1.attention",
            "layer1.attention all_reduce",
            "layer1.norm1",
        ]
        pieces = stage_subgraphs(layout, 1, "backward")[2].pieces
        assert [(p.name, p.again) for p in pieces] == [("norm2", True), ("mlp", True), ("mlp", False)]

    def test_every_collective_that_comes_again_moves_the_batch(self) -> None:
        found = context(model_preset("tiny-llama"), 0, tp=2, pp=2)
        found = replace(found, layout=replace(found.layout, recompute="full"))
        subgraphs = stage_subgraphs(found.layout, 0, "backward")
        groups = subgraph_ops(found, batch(("a", 8)), "backward")
        sizes = [
            g[0].size for s, g in zip(subgraphs, groups, strict=True) if s.kind == "collective" and s.pieces[0].again
        ]
        assert sizes == [(8 * 192 * 4,)] * 2
