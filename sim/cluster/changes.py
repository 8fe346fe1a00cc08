"""Changes of instances: an iteration ends, tasks are done, leave and join, an instance grows, idles, stops.

done(t) = count + floor((t − begin) / iteration): what lies between two changes is never visited.
"""

from __future__ import annotations

import time
from array import array
from functools import partial
from typing import Any

from muxtune.sim.cluster.fleet import Fleet
from muxtune.sim.cluster.line import Line
from muxtune.sim.cluster.parts import Instance, Member
from muxtune.sim.cluster.prices import Price
from muxtune.sim.cluster.setup import Setup
from muxtune.sim.cluster.tally import Tally
from muxtune.sim.des import Environment
from muxtune.spec.fleet import FleetRules, FleetView
from muxtune.spec.units import NS_PER_S


class Changes:
    """The half of a Replay (engine.py) that looks after instances; the other half looks after jobs that arrive and wait."""

    setup: Setup
    rules: FleetRules
    fleet: Fleet
    tally: Tally
    env: Environment
    lines: dict[str, Line]
    present: dict[int, Member]
    decision_s: array[float]
    timed: bool
    replans: int
    resizes: int
    _view: FleetView

    def dispatch_all(self) -> None:
        """Let every backbone's line be served."""
        raise NotImplementedError

    def _dispatch(self, model: str) -> None:
        raise NotImplementedError

    def requeue(self, member: Member) -> None:
        """A job that was on an instance waits again."""
        raise NotImplementedError

    def change(self, instance: Instance) -> None:
        """The set of tasks changes at the next end of an iteration."""
        if instance.state == "changing":
            return
        now_ns, begin_ns = self.env.now, instance.begin_ns
        if now_ns <= begin_ns:
            due_ns = begin_ns
        elif instance.members:
            due_ns = begin_ns - (begin_ns - now_ns) // instance.iteration_ns * instance.iteration_ns
        else:
            due_ns = now_ns
        self._schedule(instance, due_ns)

    def _schedule(self, instance: Instance, due_ns: int) -> None:
        if instance.version and instance.due_ns == due_ns:
            return
        instance.version += 1
        instance.due_ns = due_ns
        self.env.call_at(due_ns, partial(self._boundary, instance, instance.version), late=True)

    def _boundary(self, instance: Instance, version: int, _: Any) -> None:
        """An iteration ended at which tasks are done, leave or join; or the backbone is loaded."""
        if version != instance.version:
            return
        now_ns = self.fleet.now_ns = self.env.now
        self._settle(instance, now_ns)
        instance.state, instance.due_ns, instance.idle_ns = "changing", -1, -1
        gone = self._depart(instance)
        if gone:
            began_s = time.perf_counter() if self.timed else 0.0
            self._dispatch(instance.model)
            if self.timed:
                self.decision_s.append(time.perf_counter() - began_s)
        came, instance.joins = instance.joins, []
        for member in came:
            instance.add(member)
        self._resume(instance, came, gone)

    def _depart(self, instance: Instance) -> int:
        """Tasks that are done, cancelled or preempted leave; how many."""
        members, count = instance.members, instance.count
        gone = 0
        done_at = instance.next_finish()
        if done_at is not None and done_at <= count:
            for member in [m for m in members.values() if m.done_at <= count]:
                self.part(instance, member)
                self.leave(member, "completed")
                gone += 1
        if instance.away:
            for member in [m for m in members.values() if m.leaving]:
                self.part(instance, member)
                gone += 1
                if member.cancel_ns is not None and member.cancel_ns <= self.env.now:
                    self.leave(member, "cancelled")
                else:
                    member.moves += 1
                    self.requeue(member)
        return gone

    def part(self, instance: Instance, member: Member) -> None:
        """A task stops on its instance."""
        had_ns = member.had_ns
        instance.remove(member)
        self.fleet.count_service(member.tenant, member.had_ns - had_ns)

    def leave(self, member: Member, end: str, reason: str = "") -> None:
        """A job that is on an instance leaves the system."""
        member.instance = None
        self.fleet.count_running(member.tenant, -1)
        self.fleet.books.jobs(self.env.now, running=-1)
        self._out(member, end, reason)

    def _out(self, member: Member, end: str, reason: str = "") -> None:
        now_ns = self.env.now
        del self.present[member.index]
        stayed_ns = now_ns - member.arrival_ns
        slots = max(1, self.fleet.capacity // self.fleet.served.layout(member.model).ranks)
        crowd = (self.fleet.books.crowd_ns - member.crowd) / stayed_ns / slots if stayed_ns else 1.0
        self.tally.left(member, end, now_ns, member.steps * member.tokens, crowd, reason)

    def _resume(self, instance: Instance, came: list[Member], gone: int) -> None:
        """Go on with the tasks there are now; what does not fit after all goes back to the line."""
        instance.state = "running"
        now_ns, costs = self.env.now, self.setup.costs
        instance.doing = "train"
        if not instance.members:
            self._idle(instance)
            return
        clock_mhz = self.rules.clock_mhz(instance, self._view)
        if clock_mhz != instance.clock_mhz:
            self.fleet.set_clock(instance, clock_mhz)
        resized = self._resize(instance)
        price = self.fleet.price(instance)
        if not isinstance(price, Price):
            self._send_back(instance, came)
            return
        iteration_ns = round(price.iteration_ns * instance.slowdown)
        iteration_ns += costs.between_ns + costs.between_task_ns * len(instance.members)
        pause_ns = 0
        if came or gone:
            self.replans += 1
            moved = any(m.restarts or m.moves for m in came)
            pause_ns = costs.replan_ns + costs.join_ns * len(came) + costs.leave_ns * gone + costs.migrate_ns * moved
        if resized:
            self.resizes += 1
            load = self.fleet.served.weights_bytes(instance.model) * NS_PER_S
            pause_ns += costs.start_ns + load // (costs.load_bytes_per_s * instance.gpus)
        instance.begin_ns = now_ns + pause_ns
        instance.iteration_ns, instance.rate = iteration_ns, price.billed_tokens
        instance.joules, instance.busy = price.joules or 0.0, price.busy
        for member in came:
            if member.first_ns < 0:
                member.first_ns = instance.begin_ns
        done_at = instance.next_finish()
        assert done_at is not None
        self._schedule(instance, instance.begin_ns + (done_at - instance.count) * iteration_ns)
        if resized:
            self.dispatch_all()

    def _resize(self, instance: Instance) -> bool:
        """Scale an instance up as the policy asks, or down again."""
        if self.rules.grows(instance, self._view):
            return self.fleet.grow(instance)
        return instance.doublings > 0 and self.fleet.shrink(instance)

    def _send_back(self, instance: Instance, came: list[Member]) -> None:
        self.fleet.careful.add(instance.shape)
        for member in came[-1:]:
            instance.remove(member)
            self.requeue(member)
        self._resume(instance, came[:-1], 1)
        self._dispatch(instance.model)

    def _idle(self, instance: Instance) -> None:
        now_ns = self.env.now
        if instance.doublings:
            self.fleet.stop(instance)
            self.dispatch_all()
            return
        instance.begin_ns = instance.idle_ns = now_ns
        instance.iteration_ns = 0
        wait_ns = self.rules.idle_stop_ns
        if wait_ns is not None:
            self.env.call_at(now_ns + wait_ns, partial(self._stop_idle, instance, now_ns), late=True)
        if any(line for model, line in self.lines.items() if model != instance.model):
            self.dispatch_all()

    def _stop_idle(self, instance: Instance, since_ns: int, _: Any) -> None:
        if instance.state != "running" or instance.idle_ns != since_ns or instance.joins:
            return
        self.fleet.now_ns = self.env.now
        self._settle(instance, self.env.now)
        self.fleet.stop(instance)
        self.dispatch_all()

    def _settle(self, instance: Instance, now_ns: int, whole: bool = True) -> None:
        """Count the time since the last look; at the end of an iteration, or (not `whole`) anywhere at the end of the replay."""
        books, gpus, seen_ns, begin_ns = self.fleet.books, len(instance.devices), instance.seen_ns, instance.begin_ns
        instance.seen_ns = now_ns
        if seen_ns < begin_ns:
            books.spend("overhead", gpus, seen_ns, min(begin_ns, now_ns), instance.idle_w)
            seen_ns = begin_ns
        if now_ns <= seen_ns:
            return
        if not instance.members:
            books.spend("idle", gpus, seen_ns, now_ns, instance.idle_w)
            instance.begin_ns = now_ns
            return
        iterations, rest_ns = divmod(now_ns - begin_ns, instance.iteration_ns)
        instance.count += iterations
        instance.begin_ns = now_ns - rest_ns
        instance.share_ns += gpus * (now_ns - begin_ns) / len(instance.members)
        books.train(
            begin_ns, now_ns - rest_ns, gpus, iterations * instance.rate, iterations * instance.joules, instance.busy
        )
        if not whole:
            books.spend("busy", gpus, now_ns - rest_ns, now_ns, instance.idle_w)
