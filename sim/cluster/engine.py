"""Replay: the events of a cluster on SimPy. Between them an instance jumps by whole iterations of a predicted time.

An instance changes its tasks only at the end of an iteration: done(t) = count + floor((t − begin) / iteration).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

from muxtune.sim.cluster.changes import Changes
from muxtune.sim.cluster.faults import Faults
from muxtune.sim.cluster.fleet import Fleet
from muxtune.sim.cluster.line import Line
from muxtune.sim.cluster.parts import Member
from muxtune.sim.cluster.prices import Prices
from muxtune.sim.cluster.setup import Setup
from muxtune.sim.cluster.tally import Tally, Told
from muxtune.sim.des import Environment
from muxtune.spec.errors import InputError, PlanError
from muxtune.spec.fleet import FleetRules, FleetView, task_type
from muxtune.spec.jobs import Job, Trace, job_steps

#: Events between two looks at whether the user wants to stop; one event may take a plan.
PATIENCE = 16


class Replay(Changes):
    """One trace under one cluster policy and one pricer. `run` once; the figures are in `tally`, `fleet.books` and here."""

    def __init__(
        self,
        trace: Trace,
        rules: FleetRules,
        setup: Setup,
        prices: Prices,
        told: Told | None = None,
        timed: bool = True,
    ) -> None:
        self.trace = trace
        self.rules = rules
        self.setup = setup
        self.fleet = Fleet(setup, prices)
        # A policy only hands back what it was handed: a Fleet is given Members and Instances.
        self._view = cast(FleetView, self.fleet)
        self.tally = Tally(told)
        self.env = Environment()
        self.lines: dict[str, Line] = {}
        self.replans = self.preemptions = self.starts = self.resizes = 0
        self.complete = True
        self.decision_s = array("d")
        self.timed = timed
        self._jobs: Iterator[Job] = iter(trace)
        self.faults = Faults(self)
        self.present: dict[int, Member] = {}
        self._more = True
        self._ended = False
        self._rounds = self._in_round = False
        self._last_arrival_ns = 0

    def run(self, report: Callable[[Replay], None] | None = None) -> None:
        """Replay to the end, or until `setup.stop` says so (`complete` is then false); `report` is called
        every few events.

        Raises:
            PlanError: the policy places a job where there is no room.
            InputError: a job names an unknown backbone, or arrives before the one ahead of it.
        """
        env, stop = self.env, self.setup.stop
        self._next_arrival()
        self.faults.start()
        if self.setup.until_ns is not None:
            env.call_at(self.setup.until_ns, self._until, late=True)
        next_event = env.next_event
        while next_event():
            if env.processed % PATIENCE == 0:
                if stop is not None and stop():
                    self.complete = False
                    break
                if report is not None:
                    report(self)
            if self._ended or (not self._more and not self.present):
                break
        self._close()

    def stuck(self) -> bool:
        """Whether only jobs are left that the policy places nowhere, with every device up: random faults would go on for ever."""
        fleet = self.fleet
        loading = any(i.state == "starting" for live in fleet.live.values() for i in live)
        waits = self.env.now > 0 and all(m.instance is None for m in self.present.values())
        return not self._more and waits and not loading and not any(p.down for p in fleet.pools)

    def _until(self, _: Any) -> None:
        self._ended = True

    def _close(self) -> None:
        """Count what is under way up to now."""
        fleet = self.fleet
        fleet.now_ns = self.env.now
        for instance in [i for live in fleet.live.values() for i in live]:
            self._settle(instance, fleet.now_ns, whole=False)
        fleet.books.close(fleet.now_ns)

    # Arrivals.

    def _next_arrival(self) -> None:
        job = next(self._jobs, None)
        if job is None:
            self._more = False
            return
        if job.arrival_ns < self._last_arrival_ns:
            raise InputError(
                f"trace {self.trace.about.name}: job {job.job_id} arrives at {job.arrival_ns} ns, before the one ahead "
                f"of it ({self._last_arrival_ns} ns): sort the trace by arrival"
            )
        self._last_arrival_ns = job.arrival_ns
        self.env.call_at(job.arrival_ns, partial(self._arrive, job))

    def _arrive(self, job: Job, _: Any) -> None:
        fleet, now_ns = self.fleet, self.env.now
        fleet.now_ns = now_ns
        self._next_arrival()
        member = self._member(job)
        self.tally.arrived(member)
        began_s = time.perf_counter() if self.timed else 0.0
        reason = self._refused(member)
        if reason is not None:
            self.tally.left(member, "rejected", now_ns, 0, 0.0, reason)
            return
        fleet.books.jobs(now_ns, waiting=1)
        member.crowd = float(fleet.books.crowd_ns)
        self.present[member.index] = member
        if job.cancel_ns is not None:
            self.env.call_at(job.cancel_ns, partial(self._cancel, member))
        self._wait(member)
        self._dispatch(member.model)
        if self.timed:
            self.decision_s.append(time.perf_counter() - began_s)

    def _member(self, job: Job) -> Member:
        prices = self.fleet.prices
        kind = prices.kind(task_type(job))
        shape = self.fleet.reference(job.model)
        solo_ns = prices.alone_ns(kind, shape)
        steps = job_steps(job, solo_ns, self.trace.about.gpu_rule, prices.shapes[shape].layout.ranks) if solo_ns else 1
        member = Member(
            self.tally.jobs,
            job.job_id,
            job.tenant,
            job.model,
            kind,
            job.arrival_ns,
            job.weight,
            job.deadline_ns,
            job.cancel_ns,
            steps,
        )
        member.alone_ns = steps * solo_ns
        member.tokens = prices.kinds[kind].step_tokens
        return member

    def _refused(self, member: Member) -> str | None:
        reason = (
            self.fleet.refusal(member.kind, member.model) if member.alone_ns else "does not fit the reference instance"
        )
        return reason if reason is not None else self.rules.admit(member, self._view)

    # Waiting and dispatch.

    def _wait(self, member: Member) -> None:
        line = self.lines.get(member.model)
        if line is None:
            line = self.lines[member.model] = Line()
        line.push(member, self.rules.group(member), self.rules.key(member, self._view))
        self.fleet.lines_waiting += 1

    def dispatch_all(self) -> None:
        """Let every backbone's line be served."""
        for model in list(self.lines):
            self._dispatch(model)

    def _dispatch(self, model: str) -> None:
        line, rules = self.lines.get(model), self.rules
        while line:
            head = line.head(self._rank)
            assert head is not None
            place = rules.place(head, self._view)
            if place is not None:
                self._require_room(place, head)
                self._assign(line, head, place)
            elif not self._make_room(line, head):
                break
        self._begin_started()
        if line and rules.round_ns and not self._rounds:
            self._rounds = True
            self.env.call_at(self.env.now + rules.round_ns, self._round, late=True)

    def _require_room(self, place: Any, head: Member) -> None:
        if not self.fleet.has_room(place, head):
            raise PlanError(
                f"cluster policy {type(self.rules).__name__}: placed job {head.job_id} on instance {place.number}, which has no "
                "room for it: ask fleet.has_room"
            )

    def _rank(self, group: str, head: Member) -> Any:
        return self.rules.group_key(group, head, self._view)

    def _make_room(self, line: Line, head: Member) -> bool:
        """Stop an idle instance of another backbone, or a running job; whether anything was done."""
        if self._reclaim(head):
            return True
        for instance in self.fleet.grown():
            self.change(instance)
        if not self.rules.preempts or (self.rules.round_ns and not self._in_round):
            return False
        victim = self.rules.victim(head, self._view)
        if victim is None:
            return False
        assert isinstance(victim, Member)
        self.preemptions += 1
        place = victim.instance
        assert place is not None
        if victim in place.joins:
            place.joins.remove(victim)
            self.requeue(victim)
        else:
            victim.leaving = True
            place.away += 1
        self._assign(line, head, place)
        return True

    def _reclaim(self, head: Member) -> bool:
        """Stop the longest idle instance of another backbone if that lets one of this backbone start."""
        fleet = self.fleet
        idle = [i for m, live in fleet.live.items() if m != head.model for i in live if i.idle_ns >= 0 and not i.joins]
        if not idle or fleet.launchable(head.model):
            return False
        chosen = min(idle, key=lambda i: (i.idle_ns, i.number))
        self._settle(chosen, self.env.now)
        fleet.stop(chosen)
        return True

    def _assign(self, line: Line, member: Member, place: Any) -> None:
        line.drop(member)
        self.fleet.lines_waiting -= 1
        self.fleet.books.jobs(self.env.now, waiting=-1, running=1)
        self.fleet.count_running(member.tenant, 1)
        member.instance = place
        place.joins.append(member)
        self.change(place)

    def requeue(self, member: Member) -> None:
        """A job that was on an instance waits again."""
        member.instance = None
        self.fleet.books.jobs(self.env.now, waiting=1, running=-1)
        self.fleet.count_running(member.tenant, -1)
        self._wait(member)

    def _begin_started(self) -> None:
        for instance in self.fleet.started:
            self.starts += 1
            self._schedule(instance, instance.begin_ns)
        self.fleet.started.clear()

    def _round(self, _: Any) -> None:
        """A round of preemption: as long as the policy names victims."""
        self._rounds, self._in_round = False, True
        self.fleet.now_ns = self.env.now
        self.dispatch_all()
        self._in_round = False

    # Cancellations.

    def _cancel(self, member: Member, _: Any) -> None:
        if member.index not in self.present:
            return
        now_ns = self.fleet.now_ns = self.env.now
        place = member.instance
        if place is None:
            self.lines[member.model].drop(member)
            self.fleet.lines_waiting -= 1
            self.fleet.books.jobs(now_ns, waiting=-1)
            self._out(member, "cancelled")
        elif member in place.joins:
            place.joins.remove(member)
            self.leave(member, "cancelled")
        else:
            if not member.leaving:
                member.leaving = True
                place.away += 1
            self.change(place)
