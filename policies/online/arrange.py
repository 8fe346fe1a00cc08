"""From a placing to a plan: new hTasks find a bucket, by the time of the eager template (policies/template.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from muxtune.policies.balance import balance
from muxtune.policies.candidates import Builder, Built, Candidate, HTaskIds
from muxtune.policies.online.grouping import NEW, Placing
from muxtune.policies.surrogate import Surrogate
from muxtune.policies.template import eager_template
from muxtune.spec.order import Template

#: Buckets → hTasks.
Packed = tuple[tuple[HTaskIds, ...], ...]


def arranged(
    builder: Builder, surrogate: Surrogate, origin: Candidate, placing: Placing, balanced: bool
) -> Built | None:
    """The plan of the fastest of some packings of a placing's hTasks into buckets; None if none can be built.

    hTasks keep their bucket; new ones get one each, or join the lightest. `balanced` also tries Eq. 7 with as many buckets,
    one fewer and one more. Eager plans launch their largest bucket first; others keep their order.
    """
    loads = {p.tasks: surrogate.first_stage_ns(p.tasks) for p in placing}
    best: tuple[Template, Packed] | None = None
    for packed in dict.fromkeys(_packings(placing, loads, balanced)):
        ordered = _descending(packed, loads) if origin.order == "eager" else packed
        template = _template(surrogate, ordered)
        if template is not None and (best is None or template.makespan_ns < best[0].makespan_ns):
            best = (template, ordered)
    # One bucket an hTask holds least at a time.
    template, packed = best or (None, _descending(tuple((h,) for h in loads), loads))
    return builder.build(replace(origin, buckets=packed), template)


def _packings(placing: Placing, loads: dict[HTaskIds, int], balanced: bool) -> Iterator[Packed]:
    homes: dict[int, list[HTaskIds]] = {}
    for p in placing:
        if p.bucket != NEW:
            homes.setdefault(p.bucket, []).append(p.tasks)
    kept = [tuple(homes[b]) for b in sorted(homes)]
    new = [p.tasks for p in placing if p.bucket == NEW]
    apart = (*kept, *((h,) for h in new))
    yield apart
    if new and kept:
        lightest = min(range(len(kept)), key=lambda b: (sum(loads[h] for h in kept[b]), b))
        yield tuple((*bucket, *new) if b == lightest else bucket for b, bucket in enumerate(kept))
    if balanced:
        htasks = [p.tasks for p in placing]
        for parts in range(max(1, len(apart) - 1), min(len(htasks), len(apart) + 1) + 1):
            buckets = balance([loads[h] for h in htasks], parts)
            yield tuple(tuple(htasks[i] for i in bucket) for bucket in buckets)


def _descending(packed: Packed, loads: dict[HTaskIds, int]) -> Packed:
    return tuple(sorted(packed, key=lambda bucket: -sum(loads[h] for h in bucket)))


def _template(surrogate: Surrogate, packed: Packed) -> Template | None:
    groups = tuple(h for bucket in packed for h in bucket)
    indices, start = [], 0
    for bucket in packed:
        indices.append(tuple(range(start, start + len(bucket))))
        start += len(bucket)
    return eager_template(surrogate, groups, tuple(indices))
