"""Failures and stragglers as they happen: an instance that loses a device is lost, with the work since its last checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from muxtune.sim.cluster.parts import Instance, Member
from muxtune.spec.errors import InputError
from muxtune.spec.fleet import Fault

if TYPE_CHECKING:
    from muxtune.sim.cluster.engine import Replay


class Faults:
    """Faults of a setup, one ahead of the clock. They come only as long as there are jobs.

    An instance checkpoints every `costs.checkpoint_ns`, rounded up to whole iterations, and at every change of its tasks;
    writing is not timed (adapters are megabytes).
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.failures = self.stragglers = self.killed = 0
        self._coming: Iterator[Fault] = iter(replay.setup.faults)
        self._until_ns: Counter[int] = Counter()
        self._last_ns = 0

    def start(self) -> None:
        """Wait for the next fault, unless nothing is left that could run."""
        fault = None if self.replay.stuck() else next(self._coming, None)
        if fault is None:
            return
        if fault.at_ns < self._last_ns:
            raise InputError(f"faults: one at {fault.at_ns} ns follows one at {self._last_ns} ns: sort them by time")
        known = self.replay.fleet.capacity
        if max(fault.devices) >= known or min(fault.devices) < 0:
            raise InputError(
                f"faults: device {max(fault.devices)} at {fault.at_ns} ns: the devices are 0 to {known - 1}"
            )
        self._last_ns = fault.at_ns
        self.replay.env.call_at(fault.at_ns, partial(self._strike, fault))

    def _strike(self, fault: Fault, _: Any) -> None:
        self.replay.fleet.now_ns = self.replay.env.now
        self.start()
        if fault.slowdown is None:
            self._fail(fault)
        else:
            self._slow(fault, fault.slowdown)

    def _fail(self, fault: Fault) -> None:
        """Devices go down until the last of the faults that name them is over."""
        self.failures += 1
        replay, fleet = self.replay, self.replay.fleet
        end_ns = fault.at_ns + fault.lasts_ns
        lost = {fleet.holder[d].number: fleet.holder[d] for d in fault.devices if d in fleet.holder}
        for device in fault.devices:
            fleet.pool_of(device).fail(device)
            self._until_ns[device] = max(self._until_ns[device], end_ns)
        fleet.count_devices()
        for instance in lost.values():
            self._kill(instance)
        replay.env.call_at(end_ns, partial(self._repair, fault))
        replay.dispatch_all()

    def _repair(self, fault: Fault, _: Any) -> None:
        replay, fleet = self.replay, self.replay.fleet
        fleet.now_ns = replay.env.now
        for device in fault.devices:
            if self._until_ns[device] == fleet.now_ns and device in fleet.pool_of(device).down:
                fleet.pool_of(device).repair(device)
        fleet.count_devices()
        replay.dispatch_all()

    def _kill(self, instance: Instance) -> None:
        """Its tasks go back to their last checkpoint and wait."""
        self.killed += 1
        replay = self.replay
        lost = self._lose(instance)
        members = sorted(instance.members.values(), key=lambda m: m.index)
        joins, instance.joins = instance.joins, []
        for member in members:
            was_leaving = member.leaving
            replay.part(instance, member)
            member.lost_steps += lost
            member.restarts += 1
            self._after(member, was_leaving)
        for member in joins:
            replay.requeue(member)
        replay.fleet.stop(instance)

    def _after(self, member: Member, was_leaving: bool) -> None:
        limit = self.replay.setup.max_restarts
        if was_leaving and member.cancel_ns is not None and member.cancel_ns <= self.replay.env.now:
            self.replay.leave(member, "cancelled")
        elif limit is not None and member.restarts > limit:
            self.replay.leave(member, "failed", f"its instances failed {member.restarts} times")
        else:
            self.replay.requeue(member)

    def _lose(self, instance: Instance) -> int:
        """Count the time since the last look and bring `count` back to the last checkpoint; steps lost of every task."""
        books, gpus = self.replay.fleet.books, instance.gpus
        now_ns, begin_ns, seen_ns = self.replay.env.now, instance.begin_ns, instance.seen_ns
        instance.seen_ns = now_ns
        if seen_ns < begin_ns:
            books.spend("overhead", gpus, seen_ns, min(begin_ns, now_ns), instance.idle_w)
            seen_ns = begin_ns
        if now_ns <= seen_ns:
            return 0
        if not instance.members:
            books.spend("idle", gpus, seen_ns, now_ns, instance.idle_w)
            return 0
        each_ns = instance.iteration_ns
        done = (now_ns - begin_ns) // each_ns
        lost: int = done % max(1, -(-self.replay.setup.costs.checkpoint_ns // each_ns))
        kept = done - lost
        kept_ns = begin_ns + kept * each_ns
        books.train(begin_ns, kept_ns, gpus, kept * instance.rate, kept * instance.joules, instance.busy)
        books.spend("lost", gpus, kept_ns, kept_ns + lost * each_ns)
        books.spend("lost", gpus, kept_ns + lost * each_ns, now_ns, instance.idle_w)
        books.lost_tokens += lost * instance.rate
        books.lost_joules += lost * instance.joules
        instance.count += kept
        instance.share_ns += gpus * (now_ns - begin_ns) / len(instance.members)
        return lost

    def _slow(self, fault: Fault, slowdown: float) -> None:
        self.stragglers += 1
        for device in fault.devices:
            self._pace(device, slowdown)
        self.replay.env.call_at(fault.at_ns + fault.lasts_ns, partial(self._recover, fault))

    def _recover(self, fault: Fault, _: Any) -> None:
        self.replay.fleet.now_ns = self.replay.env.now
        for device in fault.devices:
            self._pace(device, 1.0)

    def _pace(self, device: int, slowdown: float) -> None:
        """From the end of its iteration on, an instance runs at the pace of its slowest device."""
        fleet = self.replay.fleet
        instance = fleet.holder.get(device)
        slow = [fleet.slow] if instance is None else [fleet.slow, instance.slow]
        for paces in slow:
            if slowdown > 1.0:
                paces[device] = slowdown
            else:
                paces.pop(device, None)
        if instance is not None and instance.members:
            self.replay.change(instance)
