"""The one door of SimPy: an event-queue environment that counts the events it processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simpy import Environment as _SimpyEnvironment
from simpy import Event, Store
from simpy.core import EmptySchedule

__all__ = ["Environment", "Event", "Store"]

#: SimPy's priorities at equal times: NORMAL, and after everything normal.
NORMAL, LATE = 1, 2


class _Call(Event):  # type: ignore[misc]
    """An event that is due from the start, as SimPy's own Timeout is, with one callback."""

    def __init__(self, env: Environment, call: Callable[[Any], None]) -> None:
        self.env = env
        self.callbacks = [call]
        self._value = None
        self._ok = True


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

    def call_at(self, at_ns: int, call: Callable[[Any], None], late: bool = False) -> None:
        """Have `call` called (with the event) at a time from now on; `late` ones after all others of that time."""
        self.schedule(_Call(self, call), LATE if late else NORMAL, at_ns - self.now)

    def next_event(self) -> bool:
        """Process one event; False if there is none."""
        try:
            self.step()
        except EmptySchedule:
            return False
        self.processed += 1
        return True
