"""Files in and out: the one door of pydantic and yaml. An error names the file, the path inside it, the value and the remedy."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from muxtune.spec.errors import InputError
from muxtune.spec.noun import plain
from muxtune.spec.peft import peft_kinds

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 numbers and booleans, and duplicate keys refused (PyYAML's 1.1 rules change values in silence)."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        line = key_node.start_mark.line + 1
        if isinstance(key, (list, dict)):
            raise InputError(f"line {line}: key {key!r} is no text: write a plain key")
        if key in found:
            raise InputError(f"line {line}: key {key!r} occurs twice: remove one")
        found[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys (Python's reader keeps the last one in silence)."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"key {key!r} occurs twice: remove one")
        found[key] = value
    return found


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", "n~"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""] if _tag == "null" else list(_first)
    )
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def read_data(path: Path) -> Any:
    """Plain data of a YAML or JSON file.

    Raises:
        InputError: no such file, not readable, or malformed (with the line).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: file not found") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a directory: give the name of a file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        return (
            json.loads(text, object_pairs_hook=_object) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: malformed JSON: {error.msg}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{path}: {line}malformed YAML: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: holds a value that cannot be read: {error}") from error


@cache
def _adapter(noun: Any) -> TypeAdapter[Any]:
    return TypeAdapter(noun)


def validate(noun: type[T], data: Any, place: str) -> T:
    """Build a noun from plain data, strictly: unknown keys, NaN, and texts for numbers are refused.

    Raises:
        InputError: `place` (the file), the path inside it, the value and what was expected, in one sentence.
    """
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        path, value = next(_strangers(data, ""), ("top level", error))
        raise InputError(
            f"{place}: {path} = {value}: holds a value that JSON does not have: give a finite number or a text"
        ) from error
    hashable: Any = noun
    try:
        return _adapter(hashable).validate_json(text, strict=True)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise InputError(f"{place}: {_sentence(error)}") from error


def _strangers(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that JSON cannot hold: NaN, infinities, dates and other objects."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _strangers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            yield from _strangers(value, f"{path}.{index}" if path else str(index))
    elif not (data is None or isinstance(data, (str, int, float))) or data in (math.inf, -math.inf) or data != data:
        yield path or "top level", data


def validate_text(noun: type[T], text: str, place: str) -> T:
    """Build a noun from one JSON text, as strictly as `validate`.

    Raises:
        InputError: `place`, the path inside the text, the value and what was expected; malformed JSON, a key that occurs twice.
    """
    hashable: Any = noun
    try:
        json.loads(text, object_pairs_hook=_object)  # pydantic keeps the last of two equal keys in silence
        return _adapter(hashable).validate_json(text, strict=True)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise InputError(f"{place}: {_sentence(error)}") from error
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: is not JSON: {error}") from error


def _sentence(error: ValidationError) -> str:
    """The first complaint (the others often follow from it) and how many more there are."""
    first, *rest = error.errors(include_url=False)
    path = ".".join(str(p) for p in _path(first["loc"])) or "top level"
    reason = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "unexpected_keyword_argument":
        reason = "unknown key: remove it or correct its spelling"
    elif first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        reason = "is missing: add it"
    elif first["type"] == "union_tag_not_found":
        return f"{path}.kind: is missing: add it, one of {_kinds()}"
    elif first["type"] == "union_tag_invalid":
        return f"{path}.kind = {json.dumps(first['ctx']['tag'])}: unknown: known are {_kinds()}"
    shown = json.dumps(first["input"], default=str)
    value = f" = {shown}" if len(shown) <= 60 and "missing" not in first["type"] else ""
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{path}{value}: {reason}{more}"


def _kinds() -> str:
    """The one union of the nouns: PEFT methods."""
    return ", ".join(sorted(peft_kinds()))


def _path(location: tuple[Any, ...]) -> list[Any]:
    """The location without union tags (the kind of a PEFT method stands after `peft`)."""
    return [p for i, p in enumerate(location) if not (i > 0 and location[i - 1] == "peft")]


def read_noun(noun: type[T], path: Path) -> T:
    """Read and validate one noun from a YAML or JSON file."""
    return validate(noun, read_data(path), str(path))


def require_writable(path: Path) -> Path:
    """The path itself, if a file can be replaced there: nothing, or a regular file.

    Raises:
        InputError: a device, a pipe, a folder or a link, which replacing would destroy.
    """
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, which writing would replace: give the file it points to")
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file"
        raise InputError(f"{path}: is {kind}, which writing would replace: give the name of a file")
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a kill or a power cut leaves the old one or the new one, never half of it.

    Raises:
        InputError: something else than a regular file stands there, or the disk is full or refuses.
    """
    require_writable(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written: {error.strerror or error}: make room or give another place"
        ) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_noun(value: Any, path: Path) -> None:
    """Write a noun as JSON that `read_noun` reads back equal."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def json_schema(noun: Any) -> dict[str, Any]:
    """JSON Schema of a noun's files."""
    return _adapter(noun).json_schema()
