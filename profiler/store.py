"""Measured rows on disk: one parquet part a round, packed into `rows.parquet` at the end; a killed run resumes.

`meta.json` has the cases and their provenance.
"""

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
    """What a profile folder holds: the cases (a row's `case` is an index), the model, the messages, its birth.

    Rows beyond the cases are messages of `message_bytes`, then the meetings of `meeting_ranks` ranks, then `shared` cases,
    which several ranks run together.
    """

    device: str
    model: ModelSpec
    cases: tuple[Case, ...]
    message_bytes: tuple[int, ...]
    meeting_ranks: tuple[int, ...] = ()
    shared: tuple[Case, ...] = ()
    provenance: Birth

    @property
    def first_shared(self) -> int:
        """The row number of the first shared case."""
        return len(self.cases) + len(self.message_bytes) + len(self.meeting_ranks)

    @property
    def key(self) -> str:
        """Two profiles with one key can be joined."""
        born = self.provenance
        parts = (self.cases, self.message_bytes, self.meeting_ranks, self.shared)
        return digest((*parts, born.device, born.libraries))


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
                    f"{path}: holds a profile of another workload, machine or library versions; "
                    "choose another --out or delete the folder"
                )
        else:
            write_noun(meta, path)
        return self._packed() + len(self.parts())

    @property
    def packed(self) -> Path:
        """The file that finished rounds are packed into."""
        return self.folder / "rows.parquet"

    def _packed(self) -> int:
        return int(pd.read_parquet(self.packed, columns=["round"])["round"].max()) + 1 if self.packed.exists() else 0

    def parts(self) -> list[Path]:
        """The parts of rounds that are not packed, in round order."""
        first = self._packed()
        return [p for p in sorted(self.folder.glob("round-*.parquet")) if int(p.stem.removeprefix("round-")) >= first]

    def pack(self) -> None:
        """One file in place of the parts; a kill on the way leaves every round counted once."""
        if not self.parts():
            return
        part = self.packed.with_suffix(".part")
        self.rows().to_parquet(part, index=False)
        os.replace(part, self.packed)
        for path in self.folder.glob("round-*.parquet"):
            path.unlink()

    def append(
        self,
        number: int,
        rows: Sequence[tuple[int, str, int, int, int]],
        steal_percent: float = 0.0,
        revision: str = "unknown",
    ) -> None:
        """Write one round so that a kill leaves it whole or not at all.

        Its rows also say what the hypervisor took meanwhile, and which code measured.
        """
        frame = pd.DataFrame([(number, *row) for row in rows], columns=list(COLUMNS))
        frame["steal_percent"], frame["revision"] = steal_percent, revision
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
        parts = [*([self.packed] if self.packed.exists() else []), *self.parts()]
        if not parts:
            raise InputError(f"{self.folder}: no round was finished; run `muxtune profile` again, it resumes")
        return pd.concat([pd.read_parquet(p) for p in parts], ignore_index=True)
