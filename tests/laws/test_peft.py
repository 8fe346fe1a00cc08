"""Laws of every PEFT method: noun and torch file come in pairs, and the noun counts what the torch side holds."""

from __future__ import annotations

import pytest
import torch

from muxtune.executor.peft.base import Place, adapter_classes, make_adapter
from muxtune.spec.peft import TARGETS, peft_kinds

KINDS = sorted(peft_kinds())


def test_every_noun_has_a_torch_file_of_its_name() -> None:
    assert sorted(adapter_classes()) == KINDS


@pytest.mark.parametrize("column_parallel", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_noun_counts_what_the_adapter_holds(kind: str, column_parallel: bool) -> None:
    spec = peft_kinds()[kind]()
    place = Place(features=(24, 40), column_parallel=column_parallel, tp=2, tp_rank=1, device=torch.device("cpu"))
    adapter = make_adapter(spec, place, torch.Generator().manual_seed(0))
    held = list(adapter.parameters())
    assert len(held) == spec.tensors_on()
    assert sum(p.numel() for p in held) == spec.parameters_on(24, 40)
    assert sum(p.numel() for p in adapter.replicated()) == spec.replicated_on(24, 40, column_parallel)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noun_states_its_rules(kind: str) -> None:
    spec = peft_kinds()[kind]()
    assert spec.kind == kind
    assert spec.targets
    assert set(spec.targets) <= set(TARGETS)
    assert spec.DISPATCH
    assert spec.AGGREGATE
