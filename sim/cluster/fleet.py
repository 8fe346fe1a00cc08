"""Fleet: instances on pools of devices, and what is predicted of them. This is what a cluster policy looks at."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from muxtune.sim.cluster.books import Books
from muxtune.sim.cluster.parts import Instance, Member
from muxtune.sim.cluster.pool import Pool
from muxtune.sim.cluster.prices import Price, Prices, Refusal
from muxtune.sim.cluster.setup import Served, Setup
from muxtune.spec.units import NS_PER_S


class Fleet:
    """Instances and devices at one moment (`now_ns`, kept by the engine), and questions about them."""

    def __init__(self, setup: Setup, prices: Prices) -> None:
        self.setup = setup
        self.served = Served(setup)
        self.prices = prices
        self.now_ns = 0
        self.pools: list[Pool] = []
        for cluster in setup.clusters:
            self.pools.append(Pool(cluster, self.pools[-1].end if self.pools else 0))
        self.capacity = self.pools[-1].end
        self.books = Books(self.capacity)
        self.count_devices()
        self.live: dict[str, list[Instance]] = {}
        self.launched = 0
        self.slow: dict[int, float] = {}
        self.holder: dict[int, Instance] = {}
        self.started: list[Instance] = []
        self.lines_waiting = 0
        self._running: Counter[str] = Counter()
        self._served_ns: dict[str, float] = {}
        self.careful: set[int] = set()
        self._seen: set[tuple[int, int]] = set()
        self._reference: dict[str, int] = {}
        self._refused: dict[int, str | None] = {}

    def count_devices(self) -> None:
        """Tell the books how many devices are free and down."""
        free_w = sum(p.free * p.cluster.device.idle_w for p in self.pools)
        down = sum(len(p.down) for p in self.pools)
        self.books.devices(self.now_ns, sum(p.free for p in self.pools), down, free_w)

    # What a policy may ask (spec/fleet.py: FleetView).

    def instances(self, model: str) -> Sequence[Instance]:
        """Instances of a backbone that accept tasks, oldest first."""
        return self.live.get(model, ())

    def has_room(self, instance: Instance, job: Member) -> bool:
        """Whether the job may join: the cap on tasks, and memory."""
        if instance.load >= self.setup.tasks_per_instance:
            return False
        if self._surely_fits(job.kind, instance.shape):
            return True
        return isinstance(self._price(instance, job), Price)

    def _surely_fits(self, kind: int, shape: int) -> bool:
        """Whether the cap's number of every type seen on this shape fits, so that a mix need not be asked.

        A mix takes at most what its hungriest type takes as often, unless padding mixes lengths: the engine sends a task back
        that does not fit after all, and from then on (`careful`) every mix of that shape is asked.
        """
        if shape in self.careful:
            return False
        if (shape, kind) not in self._seen:
            self._seen.add((shape, kind))
            if isinstance(self.prices.ask((kind,) * self.setup.tasks_per_instance, shape), Refusal):
                self.careful.add(shape)
                return False
        return True

    def launchable(self, model: str) -> Sequence[int]:
        """Pools with devices free for one more instance of this backbone."""
        limit = self.setup.max_instances
        if limit is not None and sum(map(len, self.live.values())) >= limit:
            return ()
        layout = self.served.layout(model)
        return [n for n, p in enumerate(self.pools) if p.free >= layout.ranks and p.split(layout.ranks, layout.tp)]

    def launch(self, model: str, pool: int) -> Instance:
        """Start an instance there; it accepts tasks at once and runs them when the backbone is loaded."""
        place, layout = self.pools[pool], self.served.layout(model)
        split = place.split(layout.ranks, layout.tp)
        assert split is not None
        shape = self.prices.shape(self.served.shape(model, place.slice(split)))
        made = Instance(self.launched, model, pool, place.take(split), shape)
        self.launched += 1
        made.seen_ns = self.now_ns
        made.idle_w = place.cluster.device.idle_w
        costs = self.setup.costs
        load_ns = self.served.weights_bytes(model) * NS_PER_S // (costs.load_bytes_per_s * layout.ranks)
        made.begin_ns = made.due_ns = self.now_ns + costs.start_ns + load_ns
        made.slow = {d: self.slow[d] for d in made.devices if d in self.slow}
        self.holder.update(dict.fromkeys(made.devices, made))
        self.live.setdefault(model, []).append(made)
        self.started.append(made)
        self.count_devices()
        return made

    def rate(self, instance: Instance, more: Member | None = None) -> float:
        """Predicted billed tokens per second of the instance's load, with `more` beside it; 0 where that does not fit."""
        if more is None and not instance.load:
            return 0.0
        found = self._price(instance, more)
        return found.tokens_per_s / instance.slowdown if isinstance(found, Price) else 0.0

    def new_rate(self, model: str, pool: int, job: Member) -> float:
        """Predicted billed tokens per second of the job alone on a new instance in this pool."""
        place, layout = self.pools[pool], self.served.layout(model)
        split = place.split(layout.ranks, layout.tp)
        if split is None:
            return 0.0
        shape = self.prices.shape(self.served.shape(model, place.slice(split)))
        found = self.prices.ask((job.kind,), shape)
        return found.tokens_per_s if isinstance(found, Price) else 0.0

    def iteration_ns(self, instance: Instance, more: Member | None = None) -> int:
        """Predicted time of one iteration of the instance's load, with `more` beside it; 0 without tasks or fit."""
        if more is None and not instance.load:
            return 0
        found = self._price(instance, more)
        return round(found.iteration_ns * instance.slowdown) if isinstance(found, Price) else 0

    def remaining_steps(self, job: Member) -> int:
        """Optimizer steps that are left at the end of the iteration that runs."""
        runs = job.instance
        if runs is None or job.index not in runs.members:
            return job.left
        passed = -((runs.begin_ns - self.now_ns) // runs.iteration_ns) if self.now_ns > runs.begin_ns else 0
        return job.done_at - runs.count - passed

    def attained_ns(self, job: Member) -> int:
        """GPU time it had: its share of its instances' devices."""
        runs = job.instance
        if runs is None or job.index not in runs.members:
            return round(job.had_ns)
        since_ns = max(0, self.now_ns - runs.begin_ns)
        return round(job.had_ns + runs.share_ns - job.joined_share + runs.gpus * since_ns / len(runs.members))

    def alone_ns(self, job: Member) -> int:
        """Time that all steps of a job take alone (the reference policy on the reference instance)."""
        return job.alone_ns

    def running(self, tenant: str) -> int:
        """Tasks of a tenant that run or are about to."""
        return self._running[tenant]

    def service_ns(self, tenant: str) -> int:
        """GPU time of a tenant's stays on instances that have ended."""
        return round(self._served_ns.get(tenant, 0.0))

    def waiting(self) -> int:
        """Jobs that wait."""
        return self.lines_waiting

    def clocks_mhz(self, instance: Instance) -> Sequence[int]:
        """Core clocks of the instance's device, the reference first."""
        return self.pools[instance.pool].cluster.device.frequency_mhz

    # What the engine does.

    def reference(self, model: str) -> int:
        """The number of the reference instance's shape."""
        if model not in self._reference:
            self._reference[model] = self.prices.shape(self.served.reference(model))
        return self._reference[model]

    def refusal(self, kind: int, model: str) -> str | None:
        """Why a task cannot run even alone, in any pool."""
        if kind not in self._refused:
            self._refused[kind] = self._ask_alone(kind, model)
        return self._refused[kind]

    def _ask_alone(self, kind: int, model: str) -> str | None:
        reason = ""
        for pool, place in enumerate(self.pools):
            shape = self.served.empty_shape(model, pool)
            if shape is None:
                reason = f"{self.served.layout(model).name} does not fit cluster {place.cluster.name}"
                continue
            found = self.prices.ask((kind,), self.prices.shape(shape))
            if isinstance(found, Price):
                return None
            reason = found.reason
        return reason

    def price(self, instance: Instance) -> Price | Refusal:
        """Of the tasks that are on an instance now."""
        return self.prices.ask(tuple(sorted([m.kind for m in instance.members.values()])), instance.shape)

    def _price(self, instance: Instance, more: Member | None) -> Price | Refusal:
        kinds = sorted(m.kind for m in instance.jobs)
        if more is not None:
            insort(kinds, more.kind)
        return self.prices.ask(tuple(kinds), instance.shape)

    def pool_of(self, device: int) -> Pool:
        """The pool that a device is in."""
        return next(p for p in self.pools if device < p.end)

    def set_clock(self, instance: Instance, clock_mhz: int) -> None:
        """Run an instance at another core clock (0: the reference)."""
        instance.clock_mhz = clock_mhz
        instance.shape = self.prices.shape(replace(self.prices.shapes[instance.shape], frequency_mhz=clock_mhz))

    def grown(self) -> list[Instance]:
        """Instances that have grown and hold devices which a waiting job could use."""
        return [i for live in self.live.values() for i in live if i.doublings]

    def grow(self, instance: Instance) -> bool:
        """Double an instance's data parallelism, if devices are free, it fits and an iteration gets shorter; whether it did."""
        pool, old = self.pools[instance.pool], self.prices.shapes[instance.shape]
        split = pool.split(old.layout.ranks, old.layout.tp)
        if split is None or 2 * old.layout.dp > old.microbatches:
            return False
        counts = Counter(dict(pool.split_of(instance.devices)))
        counts.update(dict(split))
        shape = self._resized(instance, sorted(counts.items()), 2 * old.layout.dp)
        now, then = self.price(instance), self._price_on(instance, shape)
        if not isinstance(then, Price) or not isinstance(now, Price) or then.iteration_ns >= now.iteration_ns:
            return False
        more = pool.take(split)
        instance.devices += more
        instance.slow.update({d: self.slow[d] for d in more if d in self.slow})
        self.holder.update(dict.fromkeys(more, instance))
        instance.shape = shape
        instance.doublings += 1
        self.count_devices()
        return True

    def shrink(self, instance: Instance) -> bool:
        """Halve an instance that has grown, if its tasks fit then; whether it did."""
        pool, dp = self.pools[instance.pool], self.prices.shapes[instance.shape].layout.dp
        kept = instance.devices[: len(instance.devices) // 2]
        shape = self._resized(instance, pool.split_of(kept), dp // 2)
        if not isinstance(self._price_on(instance, shape), Price):
            return False
        gone = instance.devices[len(kept) :]
        for device in gone:
            del self.holder[device]
            instance.slow.pop(device, None)
        pool.give_back(gone)
        instance.devices, instance.shape = kept, shape
        instance.doublings -= 1
        self.count_devices()
        return True

    def _resized(self, instance: Instance, split: Sequence[tuple[int, int]], dp: int) -> int:
        old = self.prices.shapes[instance.shape]
        part = self.pools[instance.pool].slice(split)
        return self.prices.shape(replace(old, slice=part, layout=replace(old.layout, dp=dp)))

    def _price_on(self, instance: Instance, shape: int) -> Price | Refusal:
        return self.prices.ask(tuple(sorted([m.kind for m in instance.members.values()])), shape)

    def stop(self, instance: Instance) -> None:
        """Take an instance out and free its devices."""
        instance.state = "stopped"
        instance.version += 1
        self.live[instance.model].remove(instance)
        for device in instance.devices:
            del self.holder[device]
        self.pools[instance.pool].give_back(instance.devices)
        self.count_devices()

    def count_running(self, tenant: str, change: int) -> None:
        """A task of a tenant came to an instance or left one."""
        self._running[tenant] += change

    def count_service(self, tenant: str, gpu_ns: float) -> None:
        """A stay on an instance ended."""
        self._served_ns[tenant] = self._served_ns.get(tenant, 0.0) + gpu_ns
