"""Nouns: frozen, keyword-only, one digest for equal values; units as people read them."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muxtune.spec import noun as noun_module
from muxtune.spec.layout import Layout
from muxtune.spec.noun import canonical_bytes, digest, noun, nouns, plain
from muxtune.spec.peft import TARGETS, peft_kinds
from muxtune.spec.peft.base import PeftSpec
from muxtune.spec.peft.bottleneck import Bottleneck
from muxtune.spec.peft.diff_pruning import DiffPruning
from muxtune.spec.peft.dora import DoRA
from muxtune.spec.peft.ia3 import IA3
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import HTask, Provenance
from muxtune.spec.timeline import MemorySample
from muxtune.spec.units import format_bytes, format_ns, seconds_to_ns

SPEC = Path(noun_module.__file__).parent


def spec_nouns() -> list[type[Any]]:
    """Every dataclass that a module of spec/ defines."""
    found = []
    for path in sorted(SPEC.rglob("*.py")):
        parts = path.relative_to(SPEC).with_suffix("").parts
        if parts[-1] != "__init__":
            module = importlib.import_module(".".join(("muxtune.spec", *parts)))
            found += [
                v
                for v in vars(module).values()
                if isinstance(v, type) and dataclasses.is_dataclass(v) and v.__module__ == module.__name__
            ]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("found", spec_nouns(), ids=lambda c: c.__name__)
def test_every_noun_is_frozen_slotted_and_keyword_only(found: Any) -> None:
    parameters = found.__dataclass_params__
    assert parameters.frozen
    assert hasattr(found, "__slots__")
    assert all(f.kw_only for f in dataclasses.fields(found))
    assert found.__pydantic_config__ == {"extra": "forbid", "allow_inf_nan": False}
    assert found.__doc__


@noun
class Box:
    width: float
    provenance: Provenance = Provenance()
    inner: tuple[HTask, ...] = ()


def test_digest_leaves_out_provenance() -> None:
    assert digest(Box(width=1.5)) == digest(Box(width=1.5, provenance=Provenance(plan_seconds=9.0)))
    assert digest(Box(width=1.5)) != digest(Box(width=2.5))
    assert len(digest(Box(width=1.5))) == 16


def test_equal_nouns_have_equal_digests() -> None:
    """A whole number in a float field reads back from its file as a float."""
    assert Box(width=10) == Box(width=10.0)
    assert digest(Box(width=10)) == digest(Box(width=10.0))
    assert digest(Box(width=np.float64(2.5))) == digest(Box(width=2.5))


def test_canonical_bytes_by_hand() -> None:
    made = Box(width=1.5, inner=(HTask(tasks=("ä",)),))
    assert canonical_bytes(made).decode() == (
        '{"inner":[{"alignment":"pad","chunk_tokens":0,"fuse_adapters":true,"tasks":["ä"]}],"width":1.5}'
    )


def test_lists_are_written_as_their_entries_one_by_one() -> None:
    """Long lists of one kind are written column by column: the same text as one entry after the other."""
    shared = LoRA(rank=2)
    for entries in (
        [MemorySample(rank=i % 2, time_ns=i, in_use_bytes=3) for i in range(20)],
        [Provenance(plan_seconds=1.0, environment="x")] * 9,
        [*[shared] * 9, LoRA(rank=3, alpha=2.5, targets=("qkv",))],
        [(i, None if i % 2 else "ü") for i in range(12)],
        [1, 2.0, "3", None, True, (), {}, shared, 9, 10.5],
        [True] * 9,
    ):
        apart = b",".join(canonical_bytes(x) for x in entries)
        assert canonical_bytes(entries) == canonical_bytes(tuple(entries)) == b"[" + apart + b"]"


def test_nouns_made_in_columns_are_nouns() -> None:
    made = nouns(MemorySample, 3, rank=1, time_ns=[0, 5, 9], in_use_bytes=[7, 8, 7])
    assert made == [MemorySample(rank=1, time_ns=t, in_use_bytes=b) for t, b in ((0, 7), (5, 8), (9, 7))]
    with pytest.raises(KeyError, match="in_use_bytes"):
        nouns(MemorySample, 1, rank=1, time_ns=[0])
    with pytest.raises(TypeError, match=r"MemorySample: \['size'\]"):
        nouns(MemorySample, 1, rank=1, time_ns=0, in_use_bytes=0, size=0)
    with pytest.raises(ValueError, match="shorter"):
        nouns(MemorySample, 2, rank=1, time_ns=[0], in_use_bytes=0)
    fields = dict.fromkeys(LoRA.__dataclass_fields__)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="__post_init__"):
        nouns(LoRA, 1, **fields)


def test_nan_has_no_digest() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(Box(width=float("nan")))


def test_plain_turns_numpy_into_numbers() -> None:
    found = plain({"a": np.int64(3), "b": (np.float32(0.5), True, None)})
    assert found == {"a": 3, "b": [0.5, True, None]}
    assert [type(x) for x in (found["a"], found["b"][0])] == [int, float]


def test_nouns_cannot_be_changed_or_made_by_position() -> None:
    box = Box(width=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        box.width = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Box(1.0)  # type: ignore[misc]
    assert hash(box) == hash(Box(width=1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HTask(tasks=()), "an hTask has at least one task"),
        (lambda: HTask(tasks=("a",), alignment="flat"), r"alignment='flat': known are \['pad', 'varlen', 'chunk'\]"),
        (lambda: HTask(tasks=("a",), alignment="chunk"), "chunk_tokens=0 with alignment='chunk': give `chunk` a size"),
        (lambda: HTask(tasks=("a",), chunk_tokens=64), "chunk_tokens=64 with alignment='pad': give `chunk` a size"),
        (lambda: HTask(tasks=("a",), chunk_tokens=-1), "chunk_tokens=-1 with alignment='pad': give `chunk` a size"),
        (lambda: Layout(tp=0, layers_per_stage=(1,)), "tp=0: must be at least 1"),
        (lambda: Layout(pp=2, layers_per_stage=(1,)), r"layers_per_stage=\[1\]: give each of pp=2 stages"),
        (lambda: Layout(pp=2, layers_per_stage=(1, 0)), r"layers_per_stage=\[1, 0\]: give each of pp=2 stages"),
        (lambda: LoRA(dropout=1.0), r"dropout=1.0: must be in \[0, 1\)"),
        (lambda: Bottleneck(rank=0), "rank=0: must be at least 1"),
        (lambda: DoRA(targets=("mlp",)), r"targets=\['mlp'\]: name each of"),
        (lambda: DiffPruning(density=0.0), r"density=0.0: must be above 0 and at most 0.5"),
        (lambda: IA3(targets=("fc2", "fc2")), "name each of .* at most once"),
        (lambda: LoRA(targets=()), r"targets=\[\]: name each"),
        (lambda: LoRA(targets=("qkv", "qkv")), "name each of .* at most once"),
    ],
)
def test_nouns_refuse_nonsense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_lora_by_hand() -> None:
    lora = LoRA(rank=8, alpha=16.0)
    assert (lora.scale, lora.parameters_on(3, 5), lora.tensors_on()) == (2.0, 64, 2)
    assert lora.shape_on((3, 5), True, 1) == (3, 5, 8)


@pytest.mark.parametrize("kind", sorted(peft_kinds()))
def test_every_peft_method_describes_itself(kind: str) -> None:
    found = peft_kinds()[kind]()
    assert isinstance(found, PeftSpec)
    assert found.kind == kind
    assert set(found.targets) <= set(TARGETS)
    assert found.parameters_on(16, 16) > 0
    assert found.tensors_on() > 0
    assert found.DISPATCH
    assert found.AGGREGATE


def test_units_for_people() -> None:
    shown = [format_ns(n) for n in (999, 1_000, 45_600, 1_234_000, 12_340_000, 2_500_000_000, 123_400_000_000)]
    assert shown == ["999 ns", "1.00 µs", "45.6 µs", "1.23 ms", "12.3 ms", "2.50 s", "123 s"]
    shown = [format_bytes(n) for n in (1023, 1024, 1536, 10 * 1024**2, 200 * 1024**3)]
    assert shown == ["1023 B", "1.00 KiB", "1.50 KiB", "10.0 MiB", "200 GiB"]
    assert seconds_to_ns(0.1 + 0.2) == 300_000_000
