"""What a training run is fed with: the weights of a Hugging Face folder, and the texts of the data sets that have some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from muxtune.executor.messages import Feed
from muxtune.sim.traces.texts import Pair, read_token_ids
from muxtune.spec.errors import InputError
from muxtune.spec.lengths import LengthDistribution
from muxtune.spec.task import Workload

TEXT_SUFFIXES = (".jsonl", ".parquet")


def read_feed(backbone: Path | None, data: Path | None, workloads: Sequence[Workload]) -> Feed:
    """Read every data set of the workloads that is a text file under `data`, and check it against the lengths planned with.

    Raises:
        InputError: no such folder or file, other lengths than planned, a token that the backbone's vocabulary lacks, a
            backbone of other shapes.
    """
    if backbone is not None:
        from muxtune.executor.hf.backbone import HfBackbone

        HfBackbone(backbone, workloads[0].model)
    if data is None:
        return Feed(backbone=backbone)
    if not data.is_dir():
        raise InputError(f"--data {data}: no such folder: give the one that the data sets of the workload are in")
    texts: dict[str, Sequence[Pair]] = {}
    for workload in workloads:
        for lengths in workload.datasets:
            if lengths.name not in texts and lengths.name.partition("@")[0].endswith(TEXT_SUFFIXES):
                texts[lengths.name] = _read(data, lengths, workload.model.vocab)
    if not texts:
        names = ", ".join(lengths.name for w in workloads for lengths in w.datasets)
        raise InputError(f"--data {data}: no data set of the plan is a text file: it has {names}: leave --data out")
    return Feed(backbone=backbone, texts=texts)


def _read(data: Path, lengths: LengthDistribution, vocab: int) -> list[Pair]:
    """The samples of one data set, `FILE` or `FILE@TOKENIZER` under the folder."""
    name, _, tokenizer = lengths.name.partition("@")
    path = data / name
    for needed in (path, *([path.parent / tokenizer] if tokenizer else [])):
        if not needed.is_file():
            raise InputError(f"--data {data}: {needed} does not exist: give the folder that the workload was read in")
    pairs = read_token_ids(path, path.parent / tokenizer if tokenizer else None)
    planned = list(zip(lengths.prompt_tokens, lengths.response_tokens, strict=True))
    if [(len(prompt), len(response)) for prompt, response in pairs] != planned:
        raise InputError(f"{path}: its samples have other lengths than the plan's: plan again with this file")
    most = max((int(ids.max()) for pair in pairs for ids in pair if len(ids)), default=0)
    if most >= vocab:
        raise InputError(f"{path}: token {most} is outside the backbone's vocabulary of {vocab}: use its own tokenizer")
    return pairs
