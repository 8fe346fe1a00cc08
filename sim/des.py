"""The one door of SimPy: an event-queue environment that counts the events it processes."""

from __future__ import annotations

from simpy import Environment as _SimpyEnvironment
from simpy import Event, Store
from simpy.core import EmptySchedule

__all__ = ["Environment", "Event", "Store"]


class Environment(_SimpyEnvironment):  # type: ignore[misc]
    """SimPy's environment on integer nanoseconds from 0; `processed` counts events."""

    def __init__(self) -> None:
        super().__init__(initial_time=0)
        self.processed = 0

    def drain(self) -> None:
        """Process events until there are none."""
        step = self.step
        try:
            while True:
                step()
                self.processed += 1
        except EmptySchedule:
            return
