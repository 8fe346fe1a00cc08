"""From hTasks to an instance: buckets (Eq. 7), the eager template (§3.4.1) and launch lists (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from muxtune.policies.balance import Buckets
from muxtune.policies.build import make_instance
from muxtune.policies.launches import launch_lists
from muxtune.policies.surrogate import Partition, Surrogate
from muxtune.policies.template import schedule
from muxtune.spec.plan import Bucket, Instance, StageOrder


def arrange(surrogate: Surrogate, groups: Partition, *, orchestration: bool) -> tuple[Instance, float | None]:
    """(the shared instance of some hTasks, gap of the balance of its buckets).

    Without orchestration one bucket an hTask, in their order, plain 1F1B.
    """
    state, alignment, chunk = surrogate.state, surrogate.alignment, surrogate.chunk_tokens
    if not orchestration:
        return make_instance(state, "shared", groups, [[h] for h in range(len(groups))], alignment, chunk), None
    found = schedule(surrogate, groups)
    return ordered(surrogate, groups, found.buckets, found.template.orders), found.balance_gap


def ordered(surrogate: Surrogate, groups: Partition, buckets: Buckets, orders: Sequence[StageOrder]) -> Instance:
    """The shared instance with given buckets and orders, and Algorithm 1 inside the clocks."""
    made = make_instance(surrogate.state, "shared", groups, buckets, surrogate.alignment, surrogate.chunk_tokens)
    launched = tuple(_launched(surrogate, groups, b) for b in made.buckets)
    return replace(made, buckets=launched, order="explicit", orders=tuple(orders))


def _launched(surrogate: Surrogate, groups: Partition, bucket: Bucket) -> Bucket:
    """The bucket with its launch lists, where an order inside the clock makes a difference."""
    mine = [groups[h] for h in bucket.htasks]
    isolated = surrogate.isolates(mine)
    if not isolated and (len(bucket.htasks) == 1 or not surrogate.overlaps):
        return bucket
    launches = tuple(launch_lists(surrogate, bucket.htasks, mine))
    return replace(bucket, launches=launches, adapter_fusion="bucket" if isolated else "htask")
