"""What became of the jobs: counts, times as arrays, sums per tenant. Nothing here grows but eight numbers a finished job."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from muxtune.sim.cluster.parts import Member

#: How a job may end, and where it may be when the replay ends.
ENDS = ("completed", "rejected", "cancelled", "failed")

#: What is told of a job that has left.
ROW_COLUMNS = (
    *(
        "job_id",
        "tenant",
        "end",
        "arrival_s",
        "start_s",
        "end_s",
        "steps",
        "lost_steps",
        "restarts",
        "moves",
        "alone_s",
    ),
    "reason",
)
#: Told one dict (ROW_COLUMNS) a job that has left.
Told = Callable[[dict[str, Any]], Any]


class Tenant:
    """Sums over one tenant's jobs."""

    __slots__ = ("alone_ns", "completed", "deadlines", "gpu_ns", "jct_ns", "jobs", "met", "queue_ns", "tokens")

    def __init__(self) -> None:
        self.jobs = self.completed = self.met = self.deadlines = 0
        self.jct_ns = self.queue_ns = self.alone_ns = self.tokens = 0
        self.gpu_ns = 0.0


class Tally:
    """Jobs by their end. Arrays have an entry a completed job, in the order of completion."""

    def __init__(self, told: Told | None = None) -> None:
        self.told = told
        self.jobs = 0
        self.ends = dict.fromkeys(ENDS, 0)
        self.reasons: dict[str, int] = {}
        self.jct_ns = array("q")
        self.queue_ns = array("q")
        self.slowdown = array("d")
        self.unfairness = array("d")
        self.tenants: dict[str, Tenant] = {}
        self.met = self.deadlines = 0
        self.lost_steps = self.restarts = self.moves = 0
        self.asked_tokens = self.partial_tokens = 0
        self.last_ns = 0

    def arrived(self, member: Member) -> Tenant:
        """A job is in the system."""
        self.jobs += 1
        tenant = self.tenants.get(member.tenant)
        if tenant is None:
            tenant = self.tenants[member.tenant] = Tenant()
        tenant.jobs += 1
        return tenant

    def left(self, member: Member, end: str, now_ns: int, tokens: int, rivals: float, reason: str = "") -> None:
        """A job has left: completed after `tokens` billed tokens, or otherwise.

        `rivals` is the mean number of jobs in the system while it was there, over the number of instances that the cluster
        has room for.
        """
        self.ends[end] += 1
        tenant = self.tenants[member.tenant]
        self.lost_steps += member.lost_steps
        self.restarts += member.restarts
        self.moves += member.moves
        tenant.gpu_ns += member.had_ns
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if member.deadline_ns is not None and end != "cancelled":
            met = end == "completed" and now_ns <= member.deadline_ns
            self.deadlines += 1
            self.met += met
            tenant.deadlines += 1
            tenant.met += met
        if end == "completed":
            self._completed(member, tenant, now_ns, tokens, rivals)
        else:
            self.partial_tokens += (member.steps - member.left) * member.tokens
        if self.told is not None:
            self.told(_row(member, end, now_ns, reason))

    def _completed(self, member: Member, tenant: Tenant, now_ns: int, tokens: int, rivals: float) -> None:
        jct_ns, queue_ns = now_ns - member.arrival_ns, member.first_ns - member.arrival_ns
        self.last_ns = now_ns
        self.jct_ns.append(jct_ns)
        self.queue_ns.append(queue_ns)
        self.slowdown.append(jct_ns / member.alone_ns)
        self.unfairness.append(jct_ns / (member.alone_ns * max(1.0, rivals)))
        self.asked_tokens += tokens
        tenant.completed += 1
        tenant.jct_ns += jct_ns
        tenant.queue_ns += queue_ns
        tenant.alone_ns += member.alone_ns
        tenant.tokens += tokens


def _row(member: Member, end: str, now_ns: int, reason: str) -> dict[str, Any]:
    return {
        "job_id": member.job_id,
        "tenant": member.tenant,
        "end": end,
        "arrival_s": member.arrival_ns / 1e9,
        "start_s": member.first_ns / 1e9 if member.first_ns >= 0 else None,
        "end_s": now_ns / 1e9,
        "steps": member.steps,
        "lost_steps": member.lost_steps,
        "restarts": member.restarts,
        "moves": member.moves,
        "alone_s": member.alone_ns / 1e9,
        "reason": reason,
    }
