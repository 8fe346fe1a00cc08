"""Measured rows on disk: one parquet part a round, `meta.json` with the cases and their provenance; a killed run resumes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from muxtune.profiler.cases import Case
from muxtune.profiler.provenance import Birth
from muxtune.spec.errors import InputError
from muxtune.spec.files import read_noun, write_noun
from muxtune.spec.model import ModelSpec
from muxtune.spec.noun import digest, noun

COLUMNS = ("round", "case", "direction", "wall_ns", "cpu_ns", "reference_ns")


@noun
class Meta:
    """What a profile folder holds: the cases (a row's `case` is an index), the model, the message sizes, its birth."""

    device: str
    model: ModelSpec
    cases: tuple[Case, ...]
    message_bytes: tuple[int, ...]
    provenance: Birth

    @property
    def key(self) -> str:
        """Two profiles with one key can be joined."""
        return digest((self.device, self.cases, self.message_bytes, self.provenance.libraries))


class Store:
    """A profile folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, meta: Meta) -> int:
        """Start or resume: returns how many rounds are there already.

        Raises:
            InputError: the folder holds a profile of something else.
        """
        path = self.folder / "meta.json"
        if path.exists():
            found = read_noun(Meta, path)
            if found.key != meta.key:
                raise InputError(
                    f"{path}: holds a profile of another workload, device or library versions; "
                    "choose another --out or delete the folder"
                )
        else:
            write_noun(meta, path)
        return len(self.parts())

    def parts(self) -> list[Path]:
        """The parts in round order."""
        return sorted(self.folder.glob("round-*.parquet"))

    def append(self, number: int, rows: Sequence[tuple[int, str, int, int, int]]) -> None:
        """Write one round so that a kill leaves it whole or not at all."""
        frame = pd.DataFrame([(number, *row) for row in rows], columns=list(COLUMNS))
        path = self.folder / f"round-{number:04d}.parquet"
        part = path.with_suffix(".part")
        frame.to_parquet(part, index=False)
        os.replace(part, path)

    def meta(self) -> Meta:
        """The folder's certificate.

        Raises:
            InputError: there is none.
        """
        path = self.folder / "meta.json"
        if not path.exists():
            raise InputError(f"{self.folder}: holds no profile (meta.json is missing); make one with `muxtune profile`")
        return read_noun(Meta, path)

    def rows(self) -> pd.DataFrame:
        """All rows of all rounds.

        Raises:
            InputError: no round was finished.
        """
        parts = self.parts()
        if not parts:
            raise InputError(f"{self.folder}: no round was finished; run `muxtune profile` again, it resumes")
        return pd.concat([pd.read_parquet(p) for p in parts], ignore_index=True)
