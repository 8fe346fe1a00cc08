"""Where a number was born: device, operating system, library versions, git revision, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from muxtune.spec.noun import noun


@noun
class Birth:
    """The certificate of a profile or a validation. `steal_percent` is what the hypervisor took while measuring."""

    device: str
    driver: str
    host: str
    cores: int
    libraries: tuple[str, ...]
    revision: str
    command: str
    steal_percent: float = 0.0


def birth(device: str, steal_percent: float = 0.0) -> Birth:
    """Collect the certificate of this process."""
    libraries = _libraries()
    return Birth(
        device=_cpu_name() if device == "cpu" else device,
        driver=f"{platform.system()} {platform.release()}",
        host=platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        libraries=libraries,
        revision=revision(),
        command=" ".join(["muxtune", *sys.argv[1:]]),
        steal_percent=steal_percent,
    )


def foreign(born: Birth) -> tuple[str, ...]:
    """What differs between where a CPU's figures were measured and here, a sentence each; none where they are at home."""
    said: list[str] = []
    if born.device != (here := _cpu_name()):
        said.append(f"measured on {born.device}, this machine is {here}: absolute times are that machine's")
    pairs = zip(born.libraries, _libraries(), strict=False)
    if other := [f"{then} (here {now})" for then, now in pairs if then != now]:
        said.append(f"measured with {', '.join(other)}")
    return tuple(said)


def _libraries() -> tuple[str, ...]:
    return tuple(f"{n}=={_version(n)}" for n in ("torch", "megatron-core", "numpy", "simpy"))


def stolen_ticks() -> tuple[int, int]:
    """(steal, all) clock ticks of the machine so far; (0, 0) where the system does not say."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0, 0
    return fields[7], sum(fields[:8])


def steal_since(before: tuple[int, int]) -> float:
    """Percentage of clock ticks that the hypervisor took since `before` (of `stolen_ticks`)."""
    steal, ticks = (now - then for now, then in zip(stolen_ticks(), before, strict=True))
    return 100.0 * steal / ticks if ticks else 0.0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def revision() -> str:
    """The checkout that this code runs from, with `-dirty` where it was changed; `unknown` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=5, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
