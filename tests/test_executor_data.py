"""Which tokens a task's loss is over: its response tokens, counted over the whole global batch, and nothing else."""

from __future__ import annotations

from typing import Any

import torch

from muxtune.executor.data import batch_tensors, noise_source, response_counts
from muxtune.spec.align import Batch, Row
from muxtune.spec.bind import bind

CPU = torch.device("cpu")


def row(task: str, prompt: int, response: int, length: int, sample: int = 0) -> Row:
    return Row(task=task, slot=0, sample=sample, prompt_tokens=prompt, response_tokens=response, length_tokens=length)


def test_only_places_before_a_response_token_are_predicted() -> None:
    # a: PPPRR--- at 0..7, then RRRR at 8..11 (no prompt: its first token has no place before it); b: PR at 12..13.
    batch = Batch(htask=0, rows=(row("a", 3, 2, 8), row("a", 0, 4, 4, sample=1), row("b", 1, 1, 2)))
    tensors = batch_tensors(batch, noise_source(64), CPU)
    places = {task: found.tolist() for task, found in tensors.targets}
    assert places == {"a": [2, 3, 8, 9, 10], "b": [12]}
    for found in places.values():
        assert tensors.labels[found].tolist() == tensors.ids[[p + 1 for p in found]].tolist()


def test_the_mean_is_over_the_global_batch_however_it_is_cut(
    tiny_workload: Any, tiny_state: Any, hand_plan: Any
) -> None:
    workload = tiny_workload(2)
    plans = [hand_plan(tiny_state(workload, microbatches=c), [["t0", "t1"]]) for c in (1, 3)]
    one, three = (response_counts(bind(plan, seed=5).program) for plan in plans)
    assert one == three
    places = [
        sum(len(found) for t, found in batch_tensors(b, noise_source(1024), CPU).targets if t == "t0")
        for plan in plans
        for w in bind(plan, seed=5).program.units
        for b in w.batches
    ]
    assert sum(places[:1]) == sum(places[1:]) == one["t0", 0]
