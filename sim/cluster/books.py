"""Where the device time goes: capacity × time = busy + lost + overhead + idle + free + down, each counted on its own.

`busy`: iterations that count. `lost`: iterations redone after a failure, and the one it cut. `overhead`: loading weights,
re-planning, joins and leaves. `idle`: an instance without tasks. `free`: in no instance. `down`: failed.
"""

from __future__ import annotations

from muxtune.sim.cluster.series import Series
from muxtune.spec.units import NS_PER_S

KINDS = ("busy", "lost", "overhead", "idle", "free", "down")


class Books:
    """GPU-nanoseconds by kind, tokens and joules of counted iterations, and all of it over time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.gpu_ns = dict.fromkeys(KINDS, 0)
        self.tokens = 0
        self.lost_tokens = 0
        self.joules = self.lost_joules = self.idle_joules = 0.0
        self.busy_weighted_ns = 0.0
        self.series = Series(("busy_gpus", "waiting_jobs", "running_jobs", "billed_tokens"))
        self._seen_ns = 0
        self._free = capacity
        self._down = 0
        self._free_w = 0.0
        self._waiting = self._running = 0
        self.crowd_ns = 0

    def spend(self, kind: str, gpus: int, start_ns: int, end_ns: int, watts: float = 0.0) -> None:
        """So many devices were in one kind of use for a time; `watts` a device where the energy is not that of iterations."""
        if end_ns > start_ns:
            self.gpu_ns[kind] += gpus * (end_ns - start_ns)
            self.idle_joules += watts * gpus * (end_ns - start_ns) / NS_PER_S
            if kind == "busy":
                self.series.add("busy_gpus", start_ns, end_ns, gpus * (end_ns - start_ns))

    def train(self, start_ns: int, end_ns: int, gpus: int, tokens: int, joules: float, busy: float) -> None:
        """Iterations that count: `tokens` billed, `joules` on `gpus` devices, of whose time they computed a share `busy`."""
        if end_ns > start_ns:
            self.spend("busy", gpus, start_ns, end_ns)
            self.tokens += tokens
            self.joules += joules
            self.busy_weighted_ns += busy * gpus * (end_ns - start_ns)
            self.series.add("billed_tokens", start_ns, end_ns, tokens)

    def jobs(self, now_ns: int, waiting: int = 0, running: int = 0) -> None:
        """Jobs came or went: the time up to now is counted with those there were."""
        self._pass(now_ns)
        self._waiting += waiting
        self._running += running

    def devices(self, now_ns: int, free: int, down: int, free_w: float = 0.0) -> None:
        """Devices became free, taken, down or whole: so many are free and down from now on, and free ones draw so much."""
        self._pass(now_ns)
        self._free, self._down, self._free_w = free, down, free_w

    @property
    def energy_j(self) -> float:
        """Of iterations, those redone included, and of devices that do nothing; down ones draw nothing."""
        return self.joules + self.lost_joules + self.idle_joules

    def close(self, now_ns: int) -> None:
        """Count up to the end."""
        self._pass(now_ns)

    def _pass(self, now_ns: int) -> None:
        passed_ns = now_ns - self._seen_ns
        if passed_ns:
            start_ns, self._seen_ns = self._seen_ns, now_ns
            self.gpu_ns["free"] += self._free * passed_ns
            self.gpu_ns["down"] += self._down * passed_ns
            self.idle_joules += self._free_w * passed_ns / NS_PER_S
            self.crowd_ns += (self._waiting + self._running) * passed_ns
            if self._waiting:
                self.series.add("waiting_jobs", start_ns, now_ns, self._waiting * passed_ns)
            if self._running:
                self.series.add("running_jobs", start_ns, now_ns, self._running * passed_ns)
