"""The moving parts of the cluster engine: a job in the system, and an instance that counts whole iterations."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush


class Member:
    """A job in the system. While it runs, its steps are counted by its instance: it is done at iteration `done_at`."""

    __slots__ = (
        *("index", "job_id", "tenant", "model", "kind", "arrival_ns", "weight", "deadline_ns", "cancel_ns", "steps"),
        *("left", "done_at", "instance", "first_ns", "had_ns", "joined_share", "lost_steps", "restarts", "moves"),
        *("alone_ns", "crowd", "leaving", "stay", "tokens"),
    )

    def __init__(
        self,
        index: int,
        job_id: str,
        tenant: str,
        model: str,
        kind: int,
        arrival_ns: int,
        weight: float,
        deadline_ns: int | None,
        cancel_ns: int | None,
        steps: int,
    ) -> None:
        self.index = index
        self.job_id = job_id
        self.tenant = tenant
        self.model = model
        self.kind = kind
        self.arrival_ns = arrival_ns
        self.weight = weight
        self.deadline_ns = deadline_ns
        self.cancel_ns = cancel_ns
        self.steps = self.left = steps
        self.done_at = 0
        self.instance: Instance | None = None
        self.first_ns = -1
        self.had_ns = 0.0
        self.joined_share = 0.0
        self.lost_steps = self.restarts = self.moves = 0
        self.alone_ns = self.tokens = 0
        self.crowd = 0.0
        self.leaving = False
        self.stay = 0


class Instance:
    """A backbone on some devices. Iteration `count` ended at `begin_ns` or the instance was made ready then.

    `members` run; `joins` and members that are `leaving` wait for the end of the iteration. `share_ns` is the GPU time of a
    task that has been here all along: the integral of devices / tasks. `shape` is the number of its shape.
    """

    __slots__ = (
        *("number", "model", "pool", "devices", "shape", "members", "joins", "count", "begin_ns", "iteration_ns"),
        *("share_ns", "version", "state", "slow", "seen_ns", "finish", "idle_ns", "rate", "joules", "busy", "away"),
        *("due_ns", "doing", "clock_mhz", "idle_w", "doublings"),
    )

    def __init__(self, number: int, model: str, pool: int, devices: tuple[int, ...], shape: int) -> None:
        self.number = number
        self.model = model
        self.pool = pool
        self.devices = devices
        self.shape = shape
        self.members: dict[int, Member] = {}
        self.joins: list[Member] = []
        self.finish: list[tuple[int, int, int]] = []
        self.count = 0
        self.begin_ns = self.seen_ns = self.due_ns = 0
        self.iteration_ns = 0
        self.share_ns = 0.0
        self.version = 0
        self.state = "starting"
        self.doing = "start"
        self.slow: dict[int, float] = {}
        self.idle_ns = -1
        self.rate = 0
        self.joules = self.busy = 0.0
        self.away = 0
        self.clock_mhz = self.doublings = 0
        self.idle_w = 0.0

    @property
    def gpus(self) -> int:
        """Devices it stands on."""
        return len(self.devices)

    @property
    def load(self) -> int:
        """Tasks after the pending changes."""
        return len(self.members) - self.away + len(self.joins)

    @property
    def jobs(self) -> Iterator[Member]:
        """Tasks after the pending changes."""
        if self.away:
            yield from (m for m in self.members.values() if not m.leaving)
        else:
            yield from self.members.values()
        yield from self.joins

    @property
    def slowdown(self) -> float:
        """The slowest of its devices sets the pace."""
        return max(self.slow.values(), default=1.0)

    def add(self, member: Member) -> None:
        """A task starts with the next iteration."""
        member.done_at = self.count + member.left
        member.joined_share = self.share_ns
        member.stay += 1
        self.members[member.index] = member
        heappush(self.finish, (member.done_at, member.index, member.stay))

    def remove(self, member: Member) -> None:
        """A task stops at the end of iteration `count`."""
        del self.members[member.index]
        member.left = member.done_at - self.count
        member.had_ns += self.share_ns - member.joined_share
        if member.leaving:
            member.leaving = False
            self.away -= 1

    def next_finish(self) -> int | None:
        """The iteration at which the first task is done."""
        finish, members = self.finish, self.members
        while finish:
            done_at, index, stay = finish[0]
            found = members.get(index)
            if found is not None and found.stay == stay:
                return done_at
            heappop(finish)
        return None
