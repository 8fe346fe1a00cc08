"""Runs inside a worker: builds each case from the executor's own modules and times rounds over all cases in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from muxtune.executor.attention import Attending, whole_runs
from muxtune.executor.data import batch_tensors, noise_source
from muxtune.executor.interpreter import RankRun
from muxtune.executor.loss import token_losses
from muxtune.executor.megatron import RaggedAttention, activation, rotate
from muxtune.executor.peers import ALONE
from muxtune.executor.peft.base import Place, make_adapter
from muxtune.executor.reference import reference_ns
from muxtune.executor.stage import StageModel
from muxtune.executor.tasks import register_task, step_task
from muxtune.executor.worker import Worker
from muxtune.kernels import grouped_lora
from muxtune.profiler.cases import PASSAGE, Case, passage_batch
from muxtune.profiler.clocks import Part, choose_clock, copies_of, timed
from muxtune.profiler.passages import build_passage
from muxtune.profiler.shards import chunk_attention, shard_stage
from muxtune.spec.bind import bind
from muxtune.spec.catalogue import Piece
from muxtune.spec.layout import even_layout
from muxtune.spec.model import ModelSpec
from muxtune.spec.ops import CHUNK_ATTENTION
from muxtune.spec.peft import PeftSpec, peft_kinds
from muxtune.spec.plan import Plan
from muxtune.spec.task import Task

#: The reference GEMM is timed again after this many cases.
REFERENCE_EVERY = 4
#: Operators are run once untimed right before they are timed, as inside a layer, where their neighbours just ran. What cold
#: code and data cost is in the cases that run many operators themselves, and an optimizer's states are cold in a real step.
UNWARMED = (PASSAGE, "instruction", "adamw", *peft_kinds(), "attention", CHUNK_ATTENTION)
#: Of these the first case of a round is run once untimed: its data may be cold as in a step, its code is not.
WARM_CODE = (*peft_kinds(), "attention", CHUNK_ATTENTION)


@dataclass(frozen=True, slots=True)
class Timed:
    """One case in one round, with the reference GEMM of the same moment."""

    case: int
    direction: str
    wall_ns: int
    cpu_ns: int
    reference_ns: int


def prepare(worker: Worker, model: ModelSpec, tasks: dict[str, Task], cases: Sequence[Case], plan: Plan) -> None:
    """Build every case once; later rounds only run them. `plan` is the calibration plan of the instruction case."""
    choose_clock(worker.device)
    stage = StageModel(model, even_layout(model, pp=1), 0, 0, worker.device, seed=0)
    bench = Bench(worker, model, tasks, stage, plan)
    firsts = {next((i for i, c in enumerate(cases) if c.family == family), None) for family in WARM_CODE}
    worker.bench = [  # type: ignore[attr-defined]
        (bench.build(c), c.family not in UNWARMED or i in firsts) for i, c in enumerate(cases)
    ]


def measure_round(worker: Worker) -> list[Timed]:
    """One pass over all cases."""
    rows: list[Timed] = []
    reference = reference_ns(worker.device)
    for index, (run, warmed) in enumerate(worker.bench):  # type: ignore[attr-defined]
        if index % REFERENCE_EVERY == 0:
            reference = reference_ns(worker.device)
        if warmed:
            run()
        rows += [Timed(index, direction, wall_ns, cpu_ns, reference) for direction, wall_ns, cpu_ns in run()]
    return rows


class Bench:
    """Builders of cases, by family. Each returns a function that runs the case once and returns its timed parts."""

    def __init__(self, worker: Worker, model: ModelSpec, tasks: dict[str, Task], stage: StageModel, plan: Plan) -> None:
        self.worker, self.model, self.tasks, self.stage, self.plan = worker, model, tasks, stage, plan
        self.device = worker.device
        self.dtype = next(stage.gpt.parameters()).dtype

    def build(self, case: Case) -> Callable[[], list[Part]]:
        """The runner of one case."""
        pointwise = {"swiglu", "geglu", "gelu", "relu"}
        name = (
            "activation"
            if case.family in pointwise
            else "norm"
            if case.family in ("rmsnorm", "layernorm")
            else "adapter"
            if case.family in peft_kinds()
            else case.family
        )
        runner: Callable[[], list[Part]] = getattr(self, f"_{name}")(case)
        return runner

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def _graph(self, call: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], list[Part]]:
        """Forward of `call(*leaves)` under autograd, then its backward with a random gradient."""
        for leaf in leaves:
            leaf.requires_grad_(True)
        with torch.no_grad():
            gradient = torch.randn_like(call(*leaves))

        def run() -> list[Part]:
            with torch.enable_grad():
                forward, out = timed("forward", lambda: call(*leaves))
            edge = torch.autograd.graph.get_gradient_edge(out)
            del out
            backward, _ = timed("backward", lambda: torch.autograd.backward((edge,), (gradient,)))
            for leaf in leaves:
                leaf.grad = None
            return [forward, backward]

        return run

    def _embedding(self, case: Case) -> Callable[[], list[Part]]:
        tensors = batch_tensors(
            passage_batch(next(iter(self.tasks.values())), case.size[0]), noise_source(self.model.vocab), self.device
        )

        tp = self.model.vocab // case.shape[0]
        stage = self.stage if tp == 1 else shard_stage(self.model, tp, tuple(range(self.model.layers)), self.device)

        def run() -> list[Part]:
            passage = stage.begin(tensors, None)
            return [timed("forward", lambda: stage.forward_piece(passage, Piece(name="embed"), {}))[0]]

        return run

    def _norm(self, case: Case) -> Callable[[], list[Part]]:
        norm = self.stage.gpt.decoder.layers[0].input_layernorm
        return self._graph(norm, self._random(case.size[0], 1, self.model.hidden))

    def _linear(self, case: Case) -> Callable[[], list[Part]]:
        features_in, features_out, bias = case.shape
        count = copies_of(features_out * features_in * self.dtype.itemsize, self.device)
        weights = cycle([self._random(features_out, features_in) for _ in range(count)])
        offset = self._random(features_out) if bias else None
        return self._graph(lambda x: F.linear(x, next(weights), offset), self._random(case.size[0], 1, features_in))

    def _adapter(self, case: Case) -> Callable[[], list[Part]]:
        """The executor's own call for one task's adapter, on a shard of the case's shape; sums over tp are left out."""
        (tokens,), (features_in, features_out) = case.size, case.shape[:2]
        peft = peft_kinds()[case.family].of_shape(case.shape)
        column, tp = _side_of(peft, case.shape)
        weight, generator = self._random(features_out, features_in), torch.Generator().manual_seed(0)
        place = Place(
            features=(features_in, features_out),
            column_parallel=column,
            tp=tp,
            tp_rank=0,
            device=self.device,
            weight=weight,
        )
        adapter = make_adapter(peft, place, generator)
        for parameter in adapter.parameters():
            parameter.normal_()
        x, base = self._random(tokens, features_in), self._random(tokens, features_out)
        x.requires_grad_(case.direction == "forward")
        entries = [(adapter, 0, tokens)]
        feeding = peft.feeds_base(column)
        gradient = torch.randn_like(x if feeding else base)

        def run() -> list[Part]:
            out = base.clone()
            with torch.enable_grad():
                if feeding:
                    forward, out = timed("forward", lambda: adapter.dispatch_group(x, entries))
                else:
                    forward, out = timed("forward", lambda: adapter.apply_group(out, x, entries, None))
            edge = torch.autograd.graph.get_gradient_edge(out)
            name = "backward" if case.direction == "forward" else "weights"
            backward, _ = timed(name, lambda: torch.autograd.backward((edge,), (gradient,)))
            x.grad = None
            adapter.zero_grad(set_to_none=True)
            return [forward, backward] if case.direction == "forward" else [backward]

        return run

    def _empty(self, case: Case) -> Callable[[], list[Part]]:
        return self._graph(lambda x: x.view(1), self._random(1))

    def _empty_lora(self, case: Case) -> Callable[[], list[Part]]:
        """A call without groups still pays for Python, the custom function and the engine."""
        weight = self._random(1, 1)

        def call(x: Tensor) -> Tensor:
            return grouped_lora.forward(weight.clone(), x, (), ())

        return self._graph(call, self._random(1, 1))

    def _rope(self, case: Case) -> Callable[[], list[Part]]:
        (tokens,), (heads, head_dim) = case.size, case.shape
        queries = max(1, heads * self.model.heads // (self.model.heads + self.model.kv_heads))
        angles = self._random(tokens, 1, 1, head_dim)
        shapes = [(tokens, 1, n, head_dim) for n in (queries, heads - queries)]
        return self._two_graphs([lambda x: rotate(x, angles, self.stage.gpt)] * 2, [self._random(*s) for s in shapes])

    def _two_graphs(
        self, calls: Sequence[Callable[[Tensor], Tensor]], leaves: Sequence[Tensor]
    ) -> Callable[[], list[Part]]:
        """Two independent calls whose times add up (query and key are rotated apart)."""
        runs = [self._graph(call, leaf) for call, leaf in zip(calls, leaves, strict=True)]

        def run() -> list[Part]:
            parts = [part for one in runs for part in one()]
            return [
                (d, sum(p[1] for p in parts if p[0] == d), sum(p[2] for p in parts if p[0] == d))
                for d in ("forward", "backward")
            ]

        return run

    def _attention(self, case: Case) -> Callable[[], list[Part]]:
        (rows, length), (heads, kv_heads, head_dim) = case.size, case.shape
        attention = RaggedAttention(self.stage.gpt.config)
        leaves = [self._random(rows * length, 1, n, head_dim) for n in (heads, kv_heads, kv_heads)]
        runs = Attending(runs=whole_runs(((rows, length),)))
        return self._graph(lambda q, k, v: attention(q, k, v, runs), *leaves)

    def _chunk_attention(self, case: Case) -> Callable[[], list[Part]]:
        return chunk_attention(RaggedAttention(self.stage.gpt.config), case.size, case.shape, self._random)

    def _activation(self, case: Case) -> Callable[[], list[Part]]:
        width = case.shape[0] * (2 if self.model.gated else 1)
        return self._graph(lambda x: activation(self.model, self.stage.gpt, x), self._random(case.size[0], 1, width))

    def _residual(self, case: Case) -> Callable[[], list[Part]]:
        a, b = self._random(case.size[0], 1, self.model.hidden), self._random(case.size[0], 1, self.model.hidden)
        return lambda: [timed(d, lambda: a + b)[0] for d in ("forward", "backward")]

    def _cross_entropy(self, case: Case) -> Callable[[], list[Part]]:
        labels = torch.zeros(case.size[0], dtype=torch.long, device=self.device)
        places = torch.arange(case.size[0], device=self.device)

        def loss(logits: Tensor) -> Tensor:
            return torch.stack([token_losses(logits, labels, ALONE, 0, lambda: None)[places].sum() / 7]).sum()

        return self._graph(loss, self._random(case.size[0], case.shape[0]))

    def _adamw(self, case: Case) -> Callable[[], list[Part]]:
        holder = shard_stage(self.model, case.tp, case.layers, self.device)
        state = register_task(holder, self.tasks[case.task], seed=0)
        gradients = [torch.randn_like(p) for p in state.parameters]

        def run() -> list[Part]:
            for parameter, gradient in zip(state.parameters, gradients, strict=True):
                parameter.grad = gradient
            return [timed("forward", lambda: step_task(state, 1, None))[0]]

        return run

    def _passage(self, case: Case) -> Callable[[], list[Part]]:
        return build_passage(self.model, self.tasks[case.task], case, self.device)

    def _launch(self, case: Case) -> Callable[[], list[Part]]:
        run = self._rank_run()
        run.stamps = []
        launch = next(iter(run.launches.values()))[0]

        def hundred() -> None:
            for _ in range(100):
                run.launch(0, launch, lambda: None)

        def many() -> list[Part]:
            run.stamps.clear()
            (_, wall_ns, cpu_ns), _ = timed("forward", hundred)
            return [(d, wall_ns // 100, cpu_ns // 100) for d in ("forward", "backward")]

        return many

    def _rank_run(self) -> RankRun:
        bound = bind(self.plan, seed=0)
        tasks = {t: register_task(self.stage, self.tasks[t], seed=0) for i in self.plan.instances for t in i.tasks}
        stages = dict.fromkeys(range(len(self.plan.instances)), self.stage)
        return RankRun(bound, 0, stages, tasks, self.worker.groups, self.device)

    def _instruction(self, case: Case) -> Callable[[], list[Part]]:
        """Time of a forward or backward instruction that is not inside its launches, on a calibration plan of one small task."""
        run = self._rank_run()

        def once() -> list[Part]:
            marks = run.run()
            parts: list[Part] = []
            for op in ("forward", "backward"):
                wholes = {
                    m.index: m.end_ns - m.start_ns
                    for m in marks
                    if m.subgraph < 0 and run.instructions[m.index].op == op
                }
                inner = sum(m.end_ns - m.start_ns for m in marks if m.subgraph >= 0 and m.index in wholes)
                rest_ns = (sum(wholes.values()) - inner) // len(wholes)
                parts.append((op, rest_ns, rest_ns))
            return parts

        return once


def _side_of(peft: PeftSpec, shape: tuple[int, ...]) -> tuple[bool, int]:
    """(column-parallel, tp) of a shard that has this operator shape; a method that is alike on both sides has the first."""
    degrees = (1 << power for power in range(8))
    found = ((column, tp) for tp in degrees for column in (True, False))
    return next(x for x in found if peft.shape_on((shape[0], shape[1]), *x) == shape)
