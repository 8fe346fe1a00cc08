"""Memory: static bytes from parameter counts, activations that grow with rows, units in flight of each order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muxtune.policies.base import make_policy
from muxtune.sim.cost.roofline import Roofline
from muxtune.spec.align import Batch, Row
from muxtune.spec.bind import bind
from muxtune.spec.catalogue import StageContext
from muxtune.spec.layout import even_layout
from muxtune.spec.memory import MemoryWalk, rank_peaks, static_bytes
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.tensors import ADAPTER_STATE_BYTES, adapter_bytes, backbone_bytes, held_bytes, working_bytes


def contexts(name: str, *, tp: int = 1, pp: int = 1, targets: tuple[str, ...] = ("qkv",)) -> list[StageContext]:
    model = model_preset(name)
    layout = even_layout(model, tp=tp, pp=pp)
    adapters = (("a", LoRA(rank=4, targets=targets)), ("b", LoRA(rank=8, targets=("fc1",))))
    return [StageContext(model=model, layout=layout, stage=s, adapters=adapters) for s in range(pp)]


def rows(count: int, length: int, task: str = "a") -> Batch:
    made = (
        Row(task=task, slot=i, sample=0, prompt_tokens=length - 1, response_tokens=1, length_tokens=length)
        for i in range(count)
    )
    return Batch(htask=0, rows=tuple(made))


@pytest.mark.parametrize("name", ["llama2-7b", "tiny-llama", "qwen2.5-7b"])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_untied_stages_hold_the_model_once(name: str, pp: int) -> None:
    model = model_preset(name)
    assert sum(map(backbone_bytes, contexts(name, pp=pp))) == model.parameters * model.element_bytes


def test_llama2_7b_is_13_5_gb() -> None:
    assert backbone_bytes(contexts("llama2-7b")[0]) == 6_738_415_616 * 2


def test_tied_output_layer_is_copied_to_another_last_stage() -> None:
    model = model_preset("tiny-gpt2")
    extra = model.vocab * model.hidden * 4
    assert sum(map(backbone_bytes, contexts("tiny-gpt2", pp=1))) == model.parameters * 4
    assert sum(map(backbone_bytes, contexts("tiny-gpt2", pp=2))) == model.parameters * 4 + extra


def test_adapter_state_is_16_bytes_a_parameter() -> None:
    # Parameter, gradient, two moments in fp32; rank 4 on qkv (192 → 320), 4 layers.
    assert ADAPTER_STATE_BYTES == 4 * 4
    assert adapter_bytes(contexts("tiny-llama")[0], ("a",)) == 16 * 4 * 4 * (192 + 320)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("pp", [1, 2])
def test_held_and_working_grow_with_rows_and_length(name: str, pp: int) -> None:
    for context in contexts(name, pp=pp):
        for function in (held_bytes, working_bytes):
            amounts = [function(context, rows(*shape)) for shape in ((1, 32), (2, 32), (3, 32), (3, 64))]
            assert amounts == sorted(amounts)
            assert len(set(amounts)) == 4
            # Everything is linear in tokens: flash attention keeps no score matrix.
            assert function(context, rows(4, 32)) == function(context, rows(2, 64)) == 2 * amounts[1]


def test_held_bytes_by_hand() -> None:
    """A middle stage of one tiny-llama layer, one token, LoRA rank 4 on qkv (elements of 4 bytes)."""
    model = model_preset("tiny-llama")
    layout = even_layout(model, pp=4)
    context = StageContext(model=model, layout=layout, stage=1, adapters=(("a", LoRA(rank=4, targets=("qkv",))),))
    norms = 2 * (192 + 1)
    attention = (2 * 6 + 2 * 2) * 32 + 6  # q, output, k, v, log-sum-exp a head
    adapter = 192 + 4  # input of qkv, A x
    mlp = 2 * 512 + 512  # gate and up, their product
    assert held_bytes(context, rows(1, 1), fused=True) == 4 * (norms + attention + adapter + mlp)
    unfused = (6 + 2) * 32 + 4 * 32 + 512  # q and k as they were, cosines and sines for both, a copy of up
    assert held_bytes(context, rows(1, 1)) == 4 * (norms + attention + adapter + mlp + unfused)


def test_an_adapter_on_more_base_ops_holds_more() -> None:
    amounts = [
        held_bytes(contexts("tiny-llama", targets=t)[0], rows(2, 32))
        for t in (("qkv",), ("qkv", "proj"), ("qkv", "proj", "fc1"), ("qkv", "proj", "fc1", "fc2"))
    ]
    assert amounts == sorted(set(amounts))


def test_tp_halves_the_wide_parts() -> None:
    one, two = (contexts("tiny-llama", tp=tp)[0] for tp in (1, 2))
    assert held_bytes(one, rows(2, 32)) / 2 < held_bytes(two, rows(2, 32)) < held_bytes(one, rows(2, 32))
    assert backbone_bytes(two) == pytest.approx(backbone_bytes(one) / 2, rel=0.01)


def most_in_flight(plan: Plan) -> list[int]:
    """Most units that each rank holds at once."""
    bound = bind(plan, seed=0)
    most = []
    for listing in bound.program.ranks:
        walk, seen = MemoryWalk(bound, listing.rank), 0
        for instruction in listing.instructions:
            walk.step(instruction)
            seen = max(seen, walk.units_in_flight)
        assert not any(walk.parts.values())
        assert walk.in_use() == walk.static_bytes
        most.append(seen)
    return most


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 6])
def test_units_in_flight(pp: int, microbatches: int, tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> None:
    state = tiny_state(tiny_workload(1, samples=(6,)), pp=pp, microbatches=microbatches)
    assert most_in_flight(hand_plan(state, [["t0"]], order="1f1b")) == [min(pp - s, microbatches) for s in range(pp)]
    assert most_in_flight(hand_plan(state, [["t0"]], order="gpipe")) == [microbatches] * pp


def test_gpipe_needs_more_than_1f1b(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> None:
    state = tiny_state(tiny_workload(1, samples=(8,)), pp=2, microbatches=8)
    peaks = {o: rank_peaks(bind(hand_plan(state, [["t0"]], order=o), seed=0)) for o in ("1f1b", "gpipe")}
    for rank in (0, 1):
        assert peaks["1f1b"][rank].peak_bytes < peaks["gpipe"][rank].peak_bytes
        assert peaks["1f1b"][rank].static_bytes == peaks["gpipe"][rank].static_bytes


def test_peak_of_one_unit_by_hand(tiny_state: Any, tiny_workload: Any, hand_plan: Any) -> None:
    """One stage, one unit: static + held + the transient of its backward."""
    state = tiny_state(tiny_workload(1, samples=(2,)), microbatches=1)
    bound = bind(hand_plan(state, [["t0"]]), seed=0)
    walk = MemoryWalk(bound, 0)
    context, (batch,) = walk.context(0), bound.program.units[0].batches
    (peak,) = rank_peaks(bound)
    assert peak.peak_bytes == walk.static_bytes + held_bytes(context, batch) + working_bytes(context, batch)


def test_residency(tiny_state: Any, tiny_workload: Any) -> None:
    """Resident backbones add up; swapped ones take turns; adapters always add up."""
    plan = make_policy("hf-peft", Roofline()).plan(tiny_state(tiny_workload(3)))
    context = contexts("tiny-llama")[0]
    backbone = backbone_bytes(context)
    adapters = static_bytes(plan, 0) - 3 * backbone
    assert adapters > 0
    assert static_bytes(replace(plan, residency="swapped"), 0) == backbone + adapters
    assert static_bytes(plan, 3) == 0
