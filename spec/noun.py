"""The `noun` decorator (a frozen, slotted, keyword-only dataclass) and the canonical bytes and digest of a noun."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

#: The one block that digests leave out: seconds, host, versions, environment live only there.
PROVENANCE = "provenance"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def noun(cls: type[T]) -> type[T]:
    """Make `cls` a frozen slotted keyword-only dataclass whose files refuse unknown keys and NaN."""
    # Read by pydantic when a file is validated (spec/files.py); pydantic itself is not needed to build nouns.
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)


def plain(value: Any, drop: frozenset[str] = frozenset()) -> Any:
    """Turn nouns, tuples and numpy scalars into dicts, lists and Python numbers; `drop` names fields to leave out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.name not in drop]
        return {name: plain(getattr(value, name), drop) for name in names}
    if isinstance(value, dict):
        return {str(k): plain(v, drop) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, drop) for v in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else value.item()


def canonical_bytes(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and without provenance: equal nouns give equal bytes."""
    body = _whole(plain(value, frozenset({PROVENANCE})))
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _whole(value: Any) -> Any:
    """Whole floats as integers: 10 and 10.0 are equal, and a float field may hold either (a file reads back as 10.0)."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical bytes."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()[:16]
