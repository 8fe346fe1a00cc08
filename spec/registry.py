"""Plug-ins: one file each, the file name is the key (`hf_peft.py` is `hf-peft`); entry points and FILE.py:CLASS add more."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from muxtune.spec.errors import DuplicateKeyError, InputError, UnknownKeyError

#: Modules of a plug-in folder that carry shared code; a plug-in never has one of these names.
HELPERS = frozenset(
    {
        *("__init__", "base", "build", "fusion", "launches", "microbatch", "stage_latency", "surrogate", "template"),
        *("alone", "candidates", "choices", "moves", "packing"),
        *("arrange", "balance", "columns", "diving", "floors", "knapsack", "master", "solver", "thresholds"),
        *("flow", "flow_model", "vectors"),
    }
)


def plugin_modules(folder: Path, package: str, helpers: frozenset[str] = HELPERS) -> dict[str, str]:
    """Map key -> module name for every plug-in file of a folder.

    Raises:
        DuplicateKeyError: two file names give one key.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem in helpers or path.stem.startswith("_"):
            continue
        key = path.stem.replace("_", "-")
        if key in found:
            raise DuplicateKeyError(f"{folder}: two files give the key {key!r}: rename one of them")
        found[key] = f"{package}.{path.stem}"
    return found


def load_class(module: ModuleType, base: type) -> type[Any]:
    """Return the one subclass of `base` that a plug-in module defines."""
    own = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, base) and v.__module__ == module.__name__
    ]
    public = [v for v in own if not v.__name__.startswith("_")]
    if len(public) != 1:
        names = [v.__name__ for v in public]
        raise InputError(
            f"{module.__name__}: a plug-in file defines exactly one {base.__name__}, found {names or 'none'}"
        )
    return public[0]


def plugins(kind: str, folder: Path, package: str, base: type) -> dict[str, type[Any]]:
    """Every plug-in of a kind: the files of its folder, then the entry points in `muxtune.<kind>`."""
    found = {
        key: load_class(importlib.import_module(name), base) for key, name in plugin_modules(folder, package).items()
    }
    for entry in entry_points(group=f"muxtune.{kind}"):
        if entry.name in found:
            raise DuplicateKeyError(f"entry point {entry.name!r} ({entry.value}) repeats a {kind} key that muxtune has")
        found[entry.name] = entry.load()
    return found


def load_file_class(reference: str, base: type) -> type[Any]:
    """Load `FILE.py:CLASS` from outside the package.

    Raises:
        InputError: the file or the class is not there, or the class is not a `base`.
    """
    file_name, _, class_name = reference.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise InputError(f"{file_name}: file not found (a plug-in of your own is written FILE.py:CLASS)")
    spec = importlib.util.spec_from_file_location(f"_muxtune_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while the file runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{file_name}: cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        known = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, base) and v is not base]
        raise InputError(f"{file_name}: no {base.__name__} named {class_name!r}; it defines {known or 'none'}")
    return found


def plugin_class(kind: str, name: str, base: type, known: Callable[[], Mapping[str, type[Any]]]) -> type[Any]:
    """The plug-in that a name without options stands for: a key of `known`, or `FILE.py:CLASS`.

    Raises:
        UnknownKeyError: no such key. InputError: the file or the class is not there, or the class is not a `base`.
    """
    if ".py:" in name:
        return load_file_class(name, base)
    found = known()
    if name not in found:
        raise UnknownKeyError(kind, name, found)
    return found[name]


def parse_config(kind: str, name: str, config_class: type, options: Mapping[str, str]) -> Any:
    """Build a plug-in's own frozen Config from `key=value` texts, typed by its dataclass fields."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in fields:
            raise UnknownKeyError(f"option of {kind} {name}", key, fields)
        # A file without `from __future__ import annotations` has types here, not texts.
        declared: Any = fields[key].type
        annotation = declared if isinstance(declared, str) else getattr(declared, "__name__", str(declared))
        values[key] = _convert(f"{kind} {name}: {key}", text, annotation)
    try:
        return config_class(**values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{kind} {name}: {error}") from error


def split_reference(reference: str) -> tuple[str, dict[str, str]]:
    """Split `NAME:key=value,key=value` (or `FILE.py:CLASS:key=value`) into name and options."""
    head, sep, tail = reference.rpartition(":")
    if not sep or "=" not in tail:
        return reference, {}
    options: dict[str, str] = {}
    for item in tail.split(","):
        key, eq, value = item.partition("=")
        if not eq or not key or key in options:
            raise InputError(f"{reference}: {item!r} is not one key=value; write NAME:key=value,key=value")
        options[key] = value
    return head, options


def _convert(place: str, text: str, annotation: str) -> Any:
    if "bool" in annotation:
        if text not in ("true", "false", "on", "off"):
            raise InputError(f"{place}={text}: expected true or false")
        return text in ("true", "on")
    if annotation.startswith(("int", "float")):
        if text == "none" and "None" in annotation:
            return None
        try:
            return int(text) if annotation.startswith("int") else float(text)
        except ValueError as error:
            raise InputError(f"{place}={text}: expected {annotation}") from error
    return text
