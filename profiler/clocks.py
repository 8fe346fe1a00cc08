"""How a call is timed: by the host's clock on a CPU, between two events on CUDA; and what the device's sensors say meanwhile.

A part is (direction, nanoseconds of the device, nanoseconds of the host): on a CPU wall time and thread CPU time, on CUDA the
time between the events and the time that issuing took.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Part = tuple[str, int, int]
#: Cycles that the device spins before a timed call, so that the host is ahead of it and launches are not part of the time.
SPIN_CYCLES = 200_000


class HostClock:
    """Calls that compute while they run."""

    def timed(self, direction: str, call: Callable[[], Any]) -> tuple[Part, Any]:
        """Run once: wall time and thread CPU time."""
        cpu_ns, wall_ns = time.thread_time_ns(), time.perf_counter_ns()
        result = call()
        return (direction, time.perf_counter_ns() - wall_ns, time.thread_time_ns() - cpu_ns), result


class EventClock:
    """Calls that return before the device is done; `cuda` is torch.cuda, or what a test puts in its place."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda

    def timed(self, direction: str, call: Callable[[], Any]) -> tuple[Part, Any]:
        """Run once behind a spin: device time between events, host time to issue."""
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        self.cuda._sleep(SPIN_CYCLES)
        start.record()
        host_ns = time.perf_counter_ns()
        result = call()
        host_ns = time.perf_counter_ns() - host_ns
        end.record()
        end.synchronize()
        elapsed_ms: float = start.elapsed_time(end)
        return (direction, round(elapsed_ms * 1e6), host_ns), result


_clocks: dict[str, HostClock | EventClock] = {"now": HostClock()}


def choose_clock(device: torch.device) -> None:
    """Time by the clock of a device in this process from now on."""
    _clocks["now"] = EventClock() if device.type == "cuda" else HostClock()


def timed(direction: str, call: Callable[[], Any]) -> tuple[Part, Any]:
    """Run a call once and time it by the clock that was chosen (the host's)."""
    return _clocks["now"].timed(direction, call)


def copies_of(size_bytes: int, device: torch.device, cuda: Any = torch.cuda) -> int:
    """How many equal weights to rotate over so that more than twice the L2 lies between two uses; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return 1 + -(-2 * int(cuda.get_device_properties(device).L2_cache_size) // size_bytes)


def flush(device: torch.device, cuda: Any = torch.cuda) -> None:
    """Write more than twice the L2, so that the next call finds nothing of its own there."""
    if device.type == "cuda":
        torch.empty(
            2 * int(cuda.get_device_properties(device).L2_cache_size) + 1, dtype=torch.int8, device=device
        ).zero_()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What NVML says at one moment: energy since the driver was loaded, SM clock, and the bit mask that holds clocks down."""

    energy_mj: int
    sm_clock_mhz: int
    throttle: int


#: NVML's bits that mean the device was slowed down (idle and the user's own clock settings are none).
THROTTLE = {
    4: "power cap",
    8: "hardware slowdown",
    32: "thermal (software)",
    64: "thermal (hardware)",
    128: "power brake",
}


class Sensors:
    """NVML where pynvml is installed and the device is CUDA; elsewhere there is nothing to read."""

    def __init__(self, device: torch.device, nvml: Any = None) -> None:
        self.nvml = nvml
        if nvml is None and device.type == "cuda" and importlib.util.find_spec("pynvml") is not None:
            self.nvml = importlib.import_module("pynvml")
        if self.nvml is not None:
            self.nvml.nvmlInit()
            self.handle = self.nvml.nvmlDeviceGetHandleByIndex(device.index or 0)

    def read(self) -> Reading | None:
        """The sensors now; None where there are none."""
        if self.nvml is None:
            return None
        return Reading(
            energy_mj=int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)),
            sm_clock_mhz=int(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM)),
            throttle=int(self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle)),
        )

    def since(self, before: Reading | None) -> dict[str, Any]:
        """Joules since a reading, the SM clocks at both ends, and what holds the clocks down now; empty without sensors."""
        now = self.read()
        if before is None or now is None:
            return {}
        return {
            "energy_j": (now.energy_mj - before.energy_mj) / 1e3,
            "sm_clock_mhz": [before.sm_clock_mhz, now.sm_clock_mhz],
            "throttled": [name for bit, name in THROTTLE.items() if now.throttle & bit],
        }
