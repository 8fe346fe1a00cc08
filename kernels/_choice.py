"""The one door of kernel back ends: `auto` is Triton on CUDA where it is installed, the loop elsewhere; a name forces one."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch

Kernel = Literal["auto", "triton", "grouped-mm", "loop"]
KERNELS: tuple[str, ...] = get_args(Kernel)

#: Names the back end of a process from its start; `muxtune execute --kernel` sets it for its workers.
VARIABLE = "MUXTUNE_KERNEL"
_forced: list[Kernel] = []


def force(kernel: Kernel) -> None:
    """Use this back end in this process from now on.

    Raises:
        ValueError: no such back end.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: known are {list(KERNELS)}")
    _forced[:] = [kernel]


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def chosen(device: torch.device, forced: Kernel | None = None) -> Kernel:
    """The back end for tensors of a device: `forced`, else the process's choice.

    Raises:
        ValueError: Triton is not installed, or is asked for a CPU's tensors without its interpreter.
    """
    if not _forced:
        force(os.environ.get(VARIABLE, "auto"))  # type: ignore[arg-type]  # a wrong name is refused there
    kernel = forced or _forced[0]
    if kernel == "auto":
        return "triton" if device.type == "cuda" and has_triton() else "loop"
    if kernel == "triton" and not has_triton():
        raise ValueError(
            "kernel='triton': Triton is not installed: pip install 'muxtune[gpu]', or take loop or grouped-mm"
        )
    if kernel == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(
            "kernel='triton' needs a CUDA device (or TRITON_INTERPRET=1, which is slow): take loop or grouped-mm"
        )
    return kernel
