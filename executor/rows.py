"""Samples that lie in several chunks, put together again: tokens, labels and loss are those of the whole sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from muxtune.spec.align import Row
from muxtune.spec.program import UnitWork

#: (optimizer step, task, slot) → the whole sample as one row.
WholeRows = Mapping[tuple[int, str, int], Row]


def whole_rows(works: Iterable[UnitWork]) -> WholeRows:
    """Every sample of some units as one row of its own tokens; where no unit is cut these are the rows themselves."""
    found: dict[tuple[int, str, int], Row] = {}
    for work in works:
        for row in (row for batch in work.batches for row in batch.rows):
            at = (work.key.step, row.task, row.slot)
            before = found.get(at)
            if before is not None:
                row = replace(
                    row,
                    prompt_tokens=before.prompt_tokens + row.prompt_tokens,
                    response_tokens=before.response_tokens + row.response_tokens,
                    length_tokens=before.length_tokens + row.length_tokens,
                )
            found[at] = replace(row, past_tokens=0, padding_tokens=0)
    return found
