"""Ahead-of-time compilation without a GPU: `python -m muxtune.kernels._compile sm_80:bf16:64 sm_90:bf16:256` prints JSON.

For each kernel of grouped LoRA at this architecture, dtype and padded rank: registers a thread, shared memory, spilled bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from muxtune.kernels import _lora_kernels
from muxtune.kernels._lora_triton import Tile, tile_of

#: Arguments that are pointers to the tensors' dtype; other pointers are int64 tables and fp32 factors.
VALUES = ("x", "w", "h", "y", "g", "dw")
TABLES = ("tiles", "spans", "table", "hashes")


def signature(kernel: Any, dtype: str) -> dict[str, str]:
    """Type of each argument of a kernel, in Triton's spelling."""
    found = {}
    for name in kernel.arg_names:
        if name in VALUES:
            found[name] = f"*{dtype}"
        elif name in TABLES:
            found[name] = "*i64"
        elif name == "floats":
            found[name] = "*fp32"
        else:
            found[name] = "constexpr" if name.isupper() else "i32"
    return found


def constants(rank: int, tile: Tile, drops: bool) -> dict[str, dict[str, Any]]:
    """Compile-time arguments of each kernel as the launches choose them for a padded rank."""
    common = {"SIDE": 0, "SCALED": True, "DROPS": drops, "BM": tile.rows, "BR": rank}
    return {
        "shrink": {**common, "BK": tile.depth},
        "expand": {**common, "ADDS": True, "BN": tile.columns},
        "wgrad": {**common, "BN": tile.columns},
    }


def compiled(name: str, dtype: str, capability: int, constant: dict[str, Any], warps: int) -> dict[str, int]:
    """Registers, shared bytes and spilled bytes of one kernel."""
    kernel = getattr(_lora_kernels, name)
    types = signature(kernel, dtype)
    order = kernel.arg_names
    aligned = [
        n
        for n, t in types.items()
        if t.startswith("*") or n in ("width", "stride_x", "stride_h", "stride_y", "stride_g")
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(order.index(n),): v for n, v in constant.items()},
        attrs={(order.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 3}
    )
    return {"shared_bytes": built.metadata.shared, **_assembled(built.asm["ptx"], capability)}


def _assembled(ptx: str, capability: int) -> dict[str, int]:
    """What ptxas says of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", target, str(path), "-o", str(path.with_suffix(".cubin"))]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert registers is not None
    assert spilled is not None
    return {"registers": int(registers[1]), "spilled_bytes": int(spilled[1]) + int(spilled[2])}


def every_kernel(architecture: str, dtype: str, rank: int) -> dict[str, dict[str, int]]:
    """Figures of every kernel, without and with dropout."""
    capability = int(architecture.removeprefix("sm_"))
    tile = tile_of(rank, 4 if dtype == "fp32" else 2)
    found = {}
    for drops in (False, True):
        for name, constant in constants(rank, tile, drops).items():
            found[name + (" dropout" if drops else "")] = compiled(name, dtype, capability, constant, tile.warps)
    return found


if __name__ == "__main__":
    parsed = {text: text.split(":") for text in sys.argv[1:]}
    sys.stdout.write(json.dumps({text: every_kernel(a, dtype, int(rank)) for text, (a, dtype, rank) in parsed.items()}))
