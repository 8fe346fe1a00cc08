"""The `noun` decorator (a frozen, slotted, keyword-only dataclass) and the canonical bytes and digest of a noun."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import repeat
from json.encoder import encode_basestring
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

#: From so many values on a list is written column by column.
MANY = 8

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


def nouns(cls: type[T], count: int, **columns: Any) -> list[T]:
    """Many nouns at once from one column a field: a list of `count` values, or anything else for a value they all share.

    Several times faster than as many calls of the class.

    Raises:
        TypeError: the class checks what it is made of (`__post_init__`), or has no such field. KeyError: a field is missing.
        ValueError: a column is shorter or longer than `count`.
    """
    made = list(map(object.__new__, repeat(cls, count)))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        column = columns.pop(field.name)
        if isinstance(column, list) and len(column) != count:
            raise ValueError(f"{cls.__name__}.{field.name}: {len(column)} values, shorter or longer than {count}")
        values = column if isinstance(column, list) else repeat(column)
        deque(map(getattr(cls, field.name).__set__, made, values), maxlen=0)
    if columns or hasattr(cls, "__post_init__"):
        raise TypeError(f"{cls.__name__}: {sorted(columns) or '__post_init__'} is not for nouns made in columns")
    return made


def canonical_bytes(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and without provenance: equal nouns give equal bytes.

    Whole floats are written as integers: 10 and 10.0 are equal, and a float field may hold either (a file reads back
    as 10.0). ValueError for NaN and infinities.
    """
    return _Writer().text(value).encode()


class _Writer:
    """Canonical text of one value; a noun that stands in it more than once (the same object) is written once."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}

    def text(self, value: Any) -> str:
        """Compact JSON, text as it is."""
        kind = type(value)
        if kind is str:
            return encode_basestring(value)
        if kind is int:
            return repr(value)
        if value is None:
            return "null"
        if kind is tuple or kind is list:
            return f"[{','.join(self.texts(value))}]"
        if hasattr(kind, "__dataclass_fields__"):
            return self._noun(value, kind)
        if isinstance(value, dict):
            items = sorted((str(k), v) for k, v in value.items())
            return f"{{{','.join(f'{encode_basestring(k)}:{self.text(v)}' for k, v in items)}}}"
        if isinstance(value, (list, tuple)):
            return self.text(list(value))
        return _scalar(value)

    def texts(self, values: Sequence[Any]) -> Iterable[str]:
        """Texts of some values; many of one kind are written column by column, which is faster."""
        kinds = set(map(type, values)) if len(values) >= MANY else ()
        if len(kinds) != 1:
            return map(self.text, values)
        (kind,) = kinds
        if kind is int:
            return map(repr, values)
        if kind is str:
            return map(encode_basestring, values)
        distinct = {id(value): value for value in values}
        if len(distinct) < len(values):
            known = dict(zip(distinct, self.texts(list(distinct.values())), strict=True))
            return map(known.__getitem__, map(id, values))
        if not hasattr(kind, "__dataclass_fields__"):
            return map(self.text, values)
        template, values_of = _template(kind)
        columns = zip(*map(values_of, values), strict=True)
        return map(template.__mod__, zip(*map(self.texts, columns), strict=True))

    def _noun(self, value: Any, kind: type) -> str:
        found = self.known.get(id(value))
        if found is None:
            template, values_of = _template(kind)
            found = self.known[id(value)] = template % tuple(map(self.text, values_of(value)))
        return found


@cache
def _template(kind: type) -> tuple[str, Callable[[Any], Sequence[Any]]]:
    """('{"a":%s,"b":%s}', the values of a and b) of a noun's class."""
    names = sorted(f.name for f in dataclasses.fields(kind) if f.name != PROVENANCE)  # type: ignore[arg-type]
    template = "{" + ",".join(f'"{name}":%s' for name in names) + "}"
    if len(names) < 2:
        return template, lambda value: [getattr(value, name) for name in names]
    return template, attrgetter(*names)


def _scalar(value: Any) -> str:
    """None, a truth value, a number (numpy's included), or a subclass of one of them."""
    if not (value is None or isinstance(value, (str, bool, int, float))):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical bytes."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()[:16]
