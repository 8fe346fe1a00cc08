"""What a command gives back, and how its help shows an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command found: `body` for --json, `show` turns it into text; not `ok` means exit 1."""

    body: dict[str, Any]
    show: Callable[[dict[str, Any]], str]
    as_json: bool
    ok: bool = True


def example(text: str) -> str:
    """An epilog that keeps its line."""
    return f"Example:\n\n\b\n  muxtune {text}"
