"""Random small Programs: instances in sequence, stages, tp, buckets of several hTasks, launch lists, orders, several steps."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

from hypothesis import strategies as st

from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.sim.cost.base import Cost
from muxtune.spec.align import ALIGNMENTS
from muxtune.spec.bind import bind, serial_launches
from muxtune.spec.cluster import DeviceSpec, Link
from muxtune.spec.ops import Op
from muxtune.spec.order import backward_keys, bucket_major, chunks_of, forward_keys
from muxtune.spec.plan import Action, Bucket, Instance, Launch, LaunchList, Plan, Sharing, StageOrder
from muxtune.spec.program import Bound

#: (pp, tp, dp, sequence parallel) on at most four devices.
SHARES = (
    *((pp, 1, 1, False) for pp in (1, 2, 3)),
    *((pp, 2, 1, sp) for pp in (1, 2) for sp in (False, True)),
    *((pp, 1, 2, False) for pp in (1, 2)),
    (1, 2, 2, True),
)

#: One chunk of a unit of one optimizer step: (step, bucket, unit, chunk).
Work = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Prices that look random and depend only on the operator and its link.

    Every operator takes up to `more_ns` more; `link_share` = (a, b) multiplies the time of messages by a / b, rounded down.
    """

    seed: int
    more_ns: int = 0
    link_share: tuple[int, int] = (1, 1)
    model_id: str = "noise"
    calibrated: bool = False

    def draw(self, *parts: object) -> int:
        """A number from the parts alone."""
        return zlib.crc32(repr((self.seed, *parts)).encode())

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        more_ns = self.draw("more", op) % (self.more_ns + 1)
        return Cost(p50_ns=self.draw(op) % 997 + more_ns, host_ns=self.draw("host", op) % 101)

    def link_latency(self, op: Op, link: Link) -> Cost:
        a, b = self.link_share
        return Cost(p50_ns=(self.draw(op, link) % 29_989) * a // b)


@st.composite
def programs(
    draw: st.DrawFn, make_workload: Any, make_state: Any, device: str = "", sharing: Sharing = "sequence"
) -> Bound:
    """A bound plan of one to three instances in sequence, or at once and of one layout, on the first devices of two nodes."""
    made = [draw(st.sampled_from(SHARES)) for _ in range(draw(st.integers(1, 3)))]
    if sharing == "corun":
        made = made[:1] * len(made)
    samples = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    tasks = [draw(st.integers(1, 3)) for _ in made]
    workload = make_workload(sum(tasks), model="tiny-llama", samples=tuple(samples))
    layers = draw(st.integers(max(pp for pp, _, _, _ in made), 3))
    # tiny-llama has 3 kv heads, which two ranks cannot share.
    workload = dataclasses.replace(workload, model=dataclasses.replace(workload.model, kv_heads=2, layers=layers))
    cluster = device or draw(st.sampled_from(("2x2xcpu", "2x2xA100-ib", "4xA100-nvlink")))
    ids = [t.task_id for t in workload.tasks]
    steps = draw(st.integers(1, 2))
    instances: list[Instance] = []
    for number, ((pp, tp, dp, sp), count) in enumerate(zip(made, tasks, strict=True)):
        parallel: dict[str, Any] = {"pp": pp, "tp": tp, "dp": dp, "sequence_parallel": sp}
        state = make_state(workload, **parallel, microbatches=draw(st.integers(1, 3)), cluster=cluster)
        instances.append(draw(_instances(state, f"i{number}", tuple(ids[:count]), steps)))
        ids = ids[count:]
    plan = Plan(workload=workload, cluster=state.cluster, instances=tuple(instances), sharing=sharing)
    return bind(plan, seed=draw(st.integers(0, 99)), steps=steps * draw(st.integers(1, 2)))


@st.composite
def _instances(draw: st.DrawFn, state: SystemState, name: str, tasks: tuple[str, ...], steps: int) -> Instance:
    groups = _partition(draw, list(draw(st.permutations(tasks))))
    every = list(range(len(groups)))
    buckets = [every] if draw(st.booleans()) else _partition(draw, every)
    instance = make_instance(state, name, groups, buckets, draw(st.sampled_from(ALIGNMENTS)))
    fused = tuple(_fused(draw, instance, bucket) for bucket in instance.buckets)
    shuffled = tuple(_relaunched(draw, instance, bucket) for bucket in fused)
    # The calculator knows neither grouped adapters nor slowed compute: tests/test_cost_sharing.py has those.
    alone = tuple(dataclasses.replace(h, fuse_adapters=False) for h in instance.htasks)
    instance = dataclasses.replace(instance, buckets=shuffled, htasks=alone, comm_ctas=0)
    if steps == 1 and draw(st.booleans()):
        feed = tuple(draw(st.permutations(bucket_major(instance.buckets))))
        return dataclasses.replace(instance, feed=feed, order=draw(st.sampled_from(("1f1b", "gpipe"))))
    orders = _orders(draw, instance, steps)
    return dataclasses.replace(instance, order="explicit", orders=orders, steps=steps)


def _partition(draw: st.DrawFn, items: list[Any]) -> list[list[Any]]:
    cuts = sorted(draw(st.sets(st.integers(1, len(items) - 1)))) if len(items) > 1 else []
    return [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def _fused(draw: st.DrawFn, instance: Instance, bucket: Bucket) -> Bucket:
    """The bucket, and where its hTasks hold a single task each perhaps with adapters fused across them."""
    single = all(len(instance.htasks[h].tasks) == 1 for h in bucket.htasks)
    return dataclasses.replace(bucket, adapter_fusion="bucket" if single and draw(st.booleans()) else "htask")


def _relaunched(draw: st.DrawFn, instance: Instance, bucket: Bucket) -> Bucket:
    """The bucket with a random launch list for every stage and direction; each hTask's subgraphs stay in their order."""
    lists: list[LaunchList] = []
    for stage in range(instance.layout.pp):
        for serial in serial_launches(instance, bucket, stage):
            rows = {h: [x for x in serial.launches if x.htask == h] for h in bucket.htasks}
            turns = draw(st.permutations([x.htask for x in serial.launches]))
            mixed: list[Launch] = [rows[h].pop(0) for h in turns]
            if draw(st.booleans()):  # level by level, where adapters are neighbours
                mixed.sort(key=lambda x: x.subgraph)
            lists.append(dataclasses.replace(serial, launches=tuple(mixed)))
    return dataclasses.replace(bucket, launches=tuple(lists))


def _orders(draw: st.DrawFn, instance: Instance, steps: int) -> tuple[StageOrder, ...]:
    """An order in which some schedule runs: at each turn one of the stages that can do something does it."""
    random, turns = draw(st.randoms(use_true_random=False)), _Turns(instance, steps)
    units, chunks = bucket_major(instance.buckets), chunks_of(instance)
    feed = [(s, *key) for s in range(steps) for key in forward_keys(draw(st.permutations(units)), chunks)]
    drain = [(s, *key) for s in range(steps) for key in backward_keys(draw(st.permutations(units)), chunks)]
    while any(len(done) < len(drain) for done in turns.backwards):
        moves = [
            (op, s)
            for s in range(instance.layout.pp)
            for op in ("forward", "backward")
            if turns.may(op, s, feed if op == "forward" else drain)
        ]
        op, stage = random.choice(moves)
        turns.move(op, stage, feed if op == "forward" else drain)
    return tuple(StageOrder(stage=s, actions=tuple(a)) for s, a in enumerate(turns.actions))


class _Turns:
    """How far every stage is: forwards in feed order, backwards in drain order, a task's step after its last backward."""

    def __init__(self, instance: Instance, steps: int) -> None:
        self.instance, stages = instance, instance.layout.pp
        self.actions: list[list[Action]] = [[] for _ in range(stages)]
        self.forwards: list[list[Work]] = [[] for _ in range(stages)]
        self.backwards: list[list[Work]] = [[] for _ in range(stages)]
        self.holders = {
            (b, u): sorted({p.task for p in unit.parts})
            for b, bucket in enumerate(instance.buckets)
            for u, unit in enumerate(bucket.units)
        }

    def may(self, op: str, stage: int, order: list[Work]) -> bool:
        """Whether the stage's next forward or backward has all it needs."""
        done, last = (self.forwards if op == "forward" else self.backwards)[stage], self.instance.layout.pp - 1
        if len(done) == len(order):
            return False
        work = order[len(done)]
        if op == "backward":
            return work in self.forwards[stage] and (stage == last or work in self.backwards[stage + 1])
        stepped = {(a.step, a.task) for a in self.actions[stage] if a.op == "step"}
        ready = all(work[0] == 0 or (work[0] - 1, t) in stepped for t in self.holders[work[1], work[2]])
        return ready and (stage == 0 or work in self.forwards[stage - 1])

    def move(self, op: str, stage: int, order: list[Work]) -> None:
        """Do it, and the steps that it completes."""
        done = (self.forwards if op == "forward" else self.backwards)[stage]
        step, bucket, unit, chunk = work = order[len(done)]
        done.append(work)
        self.actions[stage].append(Action(op=op, bucket=bucket, unit=unit, step=step, chunk=chunk))  # type: ignore[arg-type]
        if op == "backward":
            for task in self.holders[bucket, unit]:
                if all(w in done for w in order if w[0] == step and task in self.holders[w[1], w[2]]):
                    self.actions[stage].append(Action(op="step", task=task, step=step))
