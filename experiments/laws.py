"""The laws of every policy: each is asked of a reference, and answers with a one-line counterexample or None.

`muxtune check-policy` asks them of a policy from anywhere; tests/laws/test_policies.py asks them of every policy found.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from muxtune.policies.base import Policy, SystemState, make_policy, policies
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import estimate, make_evaluate
from muxtune.spec.check import check
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InfeasibleError, InputError
from muxtune.spec.files import read_noun, write_noun
from muxtune.spec.layout import even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.noun import digest
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.plan import Plan
from muxtune.spec.registry import plugin_class, split_reference
from muxtune.spec.task import Task, Workload
from muxtune.spec.units import MIB

#: (tasks, tp, pp, C): one task to eight, fewer samples than micro-batches, one stage and two.
SHAPES = ((1, 1, 1, 1), (1, 1, 2, 4), (3, 1, 2, 2), (3, 2, 1, 2), (5, 1, 1, 4), (8, 1, 2, 4), (8, 2, 2, 1))
DATASETS = ("sst2", "openbookqa", "rte")
SEED = 5

ELSEWHERE = """
import json, sys
from muxtune.experiments.laws import law_state, planned
from muxtune.spec.noun import digest
print(json.dumps({name: digest(planned(name, law_state(6, 1, 2, 2))) for name in sys.argv[1:]}))
"""


def _require_policy(reference: str) -> None:
    make_policy(reference, Roofline())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A law by name, what it says, and what asks it of a policy reference, which `require` refuses where it names none."""

    name: str
    says: str
    ask: Callable[[str], str | None]
    require: Callable[[str], object] = _require_policy

    def counterexample(self, reference: str) -> str | None:
        """One line, or None where the law holds; an error that a policy may not raise is a counterexample.

        Raises:
            InputError: the reference, not the policy, is wrong.
        """
        self.require(reference)
        try:
            return self.ask(reference)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())
            return f"raised {type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {text}"


def law_workload(tasks: int) -> Workload:
    """Tasks t0, t1, … on a tiny LLaMA: three data sets, 2 to 4 samples a step, three ranks, in turn."""
    tables = [embedded_length(name) for name in DATASETS]
    made = tuple(
        Task(
            task_id=f"t{i}",
            peft=LoRA(rank=(4, 8, 12)[i % 3]),
            dataset=DATASETS[i % 3],
            billed_len_tokens=tables[i % 3].covered_length(),
            global_batch_samples=(2, 3, 4)[i % 3],
        )
        for i in range(tasks)
    )
    return Workload(name="laws", model=model_preset("tiny-llama"), datasets=tuple(tables[: min(3, tasks)]), tasks=made)


def law_state(tasks: int, tp: int, pp: int, microbatches: int, memory_bytes: int | None = None) -> SystemState:
    """A state on four CPU ranks with the simulator at hand; `memory_bytes` replaces the device's."""
    workload, cluster = law_workload(tasks), parse_cluster("4xcpu")
    if memory_bytes is not None:
        cluster = replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))
    return SystemState(
        workload=workload,
        cluster=cluster,
        layout=even_layout(workload.model, tp=tp, pp=pp),
        microbatches=microbatches,
        seed=SEED,
        evaluate=make_evaluate(Roofline(), SEED, draws=2),
    )


def planned(reference: str, state: SystemState) -> Plan:
    """A fresh policy's plan."""
    return make_policy(reference, Roofline()).plan(state)


def policy_class(reference: str) -> type[Policy]:
    """The class that a reference names.

    Raises:
        InputError: there is none.
    """
    name, _ = split_reference(reference)
    make_policy(reference, Roofline())
    return plugin_class("policy", name, Policy, policies)


def with_options(reference: str, options: str) -> str:
    """The reference with further options; its own win."""
    name, own = split_reference(reference)
    both = {**dict(pair.split("=", 1) for pair in options.split(",") if pair), **own}
    return ":".join(filter(None, (name, ",".join(f"{k}={v}" for k, v in both.items()))))


def variants(reference: str) -> Iterator[str]:
    """The policy as it is, then with each switch thrown (bool and Literal options); all with its quick options."""
    found = policy_class(reference)
    yield with_options(reference, found.quick)
    hints = get_type_hints(found.Config)
    given = split_reference(reference)[1]
    for field in dataclasses.fields(found.Config):
        kind = hints[field.name]
        literal = get_args(kind) if get_origin(kind) is Literal else ()
        for value in (False, True) if kind is bool else literal:
            if value != field.default and field.name not in given:
                yield with_options(with_options(reference, f"{field.name}={str(value).lower()}"), found.quick)


def _states() -> Iterator[tuple[str, SystemState]]:
    for tasks, tp, pp, microbatches in SHAPES:
        yield f"{tasks} tasks, tp={tp} pp={pp} C={microbatches}", law_state(tasks, tp, pp, microbatches)


def _executable(reference: str) -> str | None:
    for place, state in _states():
        plan = planned(reference, state)
        if not isinstance(plan, Plan):
            return f"{place}: plan() returned {type(plan).__name__}, not a Plan"
        if problems := check(plan):
            return f"{place}: {problems[0]}"
    return None


def _whole(reference: str) -> str | None:
    for place, state in _states():
        plan = planned(reference, state)
        placed = Counter(t for i in plan.instances for t in i.tasks)
        for task in state.workload.tasks:
            if placed[task.task_id] != 1:
                return f"{place}: task {task.task_id} is placed {placed[task.task_id]} times"
        if plan.workload != state.workload or plan.cluster != state.cluster:
            return f"{place}: the plan is for another workload or cluster than the state's"
    return None


def _pure(reference: str) -> str | None:
    for place, state in _states():
        policy = make_policy(reference, Roofline())
        digests = [digest(p.plan(state)) for p in (policy, policy, make_policy(reference, Roofline()))]
        if len(set(digests)) > 1:
            which = "the same object" if digests[0] != digests[1] else "a new object"
            return f"{place}: {which} planned otherwise the second time: it keeps state, draws or reads a clock"
    return None


def _signed(reference: str) -> str | None:
    made_by = planned(reference, law_state(3, 1, 2, 2)).made_by
    name, _ = split_reference(reference)
    if not made_by.policy or (".py:" not in name and made_by.policy != name):
        return f"made_by.policy is {made_by.policy!r}, expected {name!r}: use make_plan(self, {name!r}, …)"
    if made_by.cost_model != Roofline().model_id:
        return f"made_by.cost_model is {made_by.cost_model!r}, expected {Roofline().model_id!r}: use make_plan"
    return None


def _replays(reference: str) -> str | None:
    state = law_state(4, 1, 2, 2)
    plan = planned(reference, state)
    name, _ = split_reference(reference)
    spelled = ":".join(filter(None, (name, plan.made_by.config)))
    if digest(planned(spelled, state)) != digest(plan):
        return f"{spelled} (from made_by) plans otherwise"
    return None


def _survives_its_file(reference: str) -> str | None:
    plan = planned(reference, law_state(4, 1, 2, 2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write_noun(plan, path)
        again = read_noun(Plan, path)
    if again != plan or digest(again) != digest(plan):
        return "the plan read back from its file is another one: fields must have the types that Plan states"
    return None


def _refuses(reference: str) -> str | None:
    try:
        planned(reference, law_state(4, 1, 2, 2, memory_bytes=MIB))
    except InfeasibleError as error:
        text = str(error)
        if "rank " in text and "needs " in text and "has 1.00 MiB" in text:
            return None
        return f"on devices of 1 MiB the refusal names no rank, bytes needed and bytes there: {text}"
    return "on devices of 1 MiB a plan came back: return require_feasible(plan)"


def _order_free(reference: str) -> str | None:
    state = law_state(6, 1, 2, 2)
    turned = replace(state, workload=replace(state.workload, tasks=state.workload.tasks[::-1]))
    first, second = (estimate(planned(reference, s), Roofline(), SEED, draws=2).iteration_ns for s in (state, turned))
    if first != second:
        return f"6 tasks: {first} ns an iteration, {second} ns with the tasks listed in reverse"
    return None


def planned_elsewhere(references: Sequence[str], hash_seed: int) -> dict[str, str]:
    """Digests of the plans that a process with another hash seed makes.

    Raises:
        InputError: that process failed; its last line says why.
    """
    command = [sys.executable, "-c", ELSEWHERE, *references]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise InputError(f"another process failed: {(run.stderr.splitlines() or ['no message'])[-1]}")
    found: dict[str, str] = json.loads(run.stdout)
    return found


def _same_everywhere(reference: str) -> str | None:
    digests = {planned_elsewhere([reference], seed)[reference] for seed in (1, 2)}
    return (
        "two processes with different hash seeds planned differently: sort sets before use"
        if len(digests) > 1
        else None
    )


LAWS = (
    Law(name="executable", says="every plan passes `check`, from one task to eight", ask=_executable),
    Law(name="whole", says="every task is placed once; workload and cluster are the state's", ask=_whole),
    Law(name="pure", says="equal states give equal plans", ask=_pure),
    Law(name="signed", says="made_by names the policy and the cost model", ask=_signed),
    Law(name="replays", says="the config in made_by gives the same plan again", ask=_replays),
    Law(name="file", says="a plan survives its file", ask=_survives_its_file),
    Law(name="refuses", says="what does not fit is refused with rank, bytes needed and bytes there", ask=_refuses),
    Law(name="order-free", says="the order in which tasks are listed changes no iteration time", ask=_order_free),
    Law(name="everywhere", says="another process with another hash seed makes the same plan", ask=_same_everywhere),
)


def ask_all(reference: str, told: Callable[[int, int], Any] = lambda done, total: None) -> list[dict[str, Any]]:
    """Ask every law of a policy and of its switches: {law, says, ok, counterexample}, the first counterexample of each."""
    asked = list(variants(reference))
    found: list[dict[str, Any]] = []
    for index, law in enumerate(LAWS, start=1):
        against: str | None = None
        # Hash seeds do not meet switches: one pair of processes is enough.
        for variant in asked[:1] if law.name == "everywhere" else asked:
            line = law.counterexample(variant)
            if line is not None:
                against = line if variant == asked[0] else f"{variant}: {line}"
                break
        found.append({"law": law.name, "says": law.says, "ok": against is None, "counterexample": against})
        told(index, len(LAWS))
    return found
