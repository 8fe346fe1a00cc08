"""Units: time is integer nanoseconds, memory integer bytes; floats appear only in reports."""

from __future__ import annotations

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
#: Times fit 64 bits: 292 years.
MAX_NS = 2**63 - 1

KIB = 1024
MIB = 1024**2
GIB = 1024**3

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def check_range(name: str, value: int | None, least: int, most: int = MAX_NS) -> None:
    """Refuse (ValueError) a value below `least` or above `most`, 64 bits by default; None is fine."""
    if value is not None and value < least:
        raise ValueError(f"{name}={_few_digits(value)}: must be at least {least}")
    if value is not None and value > most:
        raise ValueError(f"{name}={_few_digits(value)}: must be at most {most}")


def _few_digits(value: int) -> str:
    """The number; only its size where it is so long that Python refuses to write it."""
    return str(value) if abs(value) < 10**30 else f"{'-' if value < 0 else ''}(about 2^{abs(value).bit_length() - 1})"


def seconds_to_ns(seconds: float) -> int:
    """Round seconds to integer nanoseconds."""
    return round(seconds * NS_PER_S)


def format_ns(time_ns: float) -> str:
    """Show a duration with three significant digits: 1.23 s, 45.6 ms, 789 µs."""
    for unit_ns, unit in ((NS_PER_S, "s"), (NS_PER_MS, "ms"), (NS_PER_US, "µs")):
        if abs(time_ns) >= unit_ns:
            return f"{_three(time_ns / unit_ns)} {unit}"
    return f"{time_ns:.0f} ns"


def format_bytes(count_bytes: float) -> str:
    """Show a size with three significant digits: 1.23 GiB, 45.6 MiB."""
    for unit_bytes, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count_bytes) >= unit_bytes:
            return f"{_three(count_bytes / unit_bytes)} {unit}"
    return f"{count_bytes:.0f} B"


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
