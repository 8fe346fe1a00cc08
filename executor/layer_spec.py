"""Which layer spec Megatron builds from: Transformer Engine's where a guarded probe finds it to work, the local one elsewhere.

Transformer Engine brings its norms. The linears and the attention are ours under both: adapters and collectives are cut out.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from muxtune.spec.errors import InputError

#: `auto` (default), `te` or `local`.
VARIABLE = "MUXTUNE_LAYER_SPEC"
LAYER_SPECS = ("auto", "te", "local")
PACKAGE = "transformer_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """The choice, and why."""

    kind: Literal["te", "local"]
    reason: str


def choose_layer_spec(wanted: str, load: Callable[[str], Any], cuda: bool) -> LayerSpec:
    """Probe Transformer Engine: `load` imports a module, `cuda` says whether there is a device.

    A broken installation raises all sorts of errors, of which Megatron expects ImportError only: it is hidden from Megatron.

    Raises:
        InputError: an unknown name, or `te` was asked for and does not work here.
    """
    if wanted not in LAYER_SPECS:
        raise InputError(f"{VARIABLE}={wanted!r}: known are {', '.join(LAYER_SPECS)}")
    try:
        load(f"{PACKAGE}.pytorch")
        reason = "" if cuda else f"{PACKAGE} is here, a CUDA device is not"
    except ImportError:
        reason = f"{PACKAGE} is not installed"
    except Exception as error:
        reason = f"{PACKAGE} is installed but broken ({type(error).__name__}: {error})"
        sys.modules[PACKAGE] = None  # type: ignore[assignment]  # importing it now is an ImportError
    if wanted == "te" and reason:
        raise InputError(f"layer spec te: {reason}: use auto or local")
    if wanted == "local" or reason:
        return LayerSpec(kind="local", reason=reason or "asked for")
    return LayerSpec(kind="te", reason=f"{PACKAGE} works here")


def layer_spec_here() -> LayerSpec:
    """The choice of this process."""
    return choose_layer_spec(os.environ.get(VARIABLE, "auto"), importlib.import_module, torch.cuda.is_available())
