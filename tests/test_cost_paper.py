"""Cost model `paper`: Eq. 3 and 4 by hand, in the planner's surrogate and in both engines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from muxtune.policies.build import make_instance, stage_contexts
from muxtune.policies.surrogate import Surrogate, value_ns
from muxtune.sim.cost.base import Cost, batch_ops, stage_latency_ns
from muxtune.sim.cost.paper import Paper, forward_of
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.simulate import estimate, simulate
from muxtune.spec import ops
from muxtune.spec.bind import bind
from muxtune.spec.cluster import LINKS, DeviceSpec, Link, device_presets
from muxtune.spec.ops import Op
from muxtune.spec.plan import Plan

A40 = device_presets()["A40"]
TASKS = ("t0", "t1")


@dataclass(frozen=True)
class Tokens:
    """A linear takes 10 ns a token, an adapter 4 ns at utilisation `busy`, nothing else takes time; all cost host time."""

    busy: float
    model_id: str = "tokens"
    calibrated: bool = True

    def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
        each_ns = {"linear": 10, "lora": 4}.get(op.family, 0)
        return Cost(p50_ns=each_ns * op.size[0], host_ns=10**6, utilisation=self.busy)

    def link_latency(self, op: Op, link: Link) -> Cost:
        return Cost(p50_ns=10**6)


@pytest.mark.parametrize(("busy", "adapters_ns"), [(0.25, 1024), (0.75, 1152)])
@pytest.mark.parametrize("cluster", ["4xA40", "4xcpu"])
def test_equations_3_and_4_by_hand(
    busy: float, adapters_ns: int, cluster: str, tiny_state: Any, tiny_workload: Any
) -> None:
    """Four layers on two stages, C=2, rows padded to 128: t0 has one row a micro-batch, t1 two, so Σ n = 384.

    The adapters of a BaseOp: Σ u·t = u·4·384 (384 or 1152), max t = 4·256 = 1024. The head is one more linear of stage 2.
    """
    layer_ns = 4 * (10 * 384 + adapters_ns)
    first_ns, last_ns = 2 * layer_ns, 2 * layer_ns + 10 * 384
    cost = Paper(base=Tokens(busy))
    workload = tiny_workload(2, samples=(2, 4))
    state = tiny_state(workload, pp=2, microbatches=2, cluster=cluster)
    surrogate = Surrogate(cost, state, "pad")
    found = surrogate.microbatch(TASKS)
    assert found is not None
    assert found.forward_ns == found.backward_ns == (first_ns, last_ns)
    assert value_ns(surrogate, [TASKS]) == 2 * first_ns + 2 * 2 * last_ns
    instance = make_instance(state, "both", [TASKS], [[0]])
    run = simulate(bind(Plan(workload=workload, cluster=state.cluster, instances=(instance,)), seed=0), cost)
    for span in run.timeline.spans:
        if span.op in ("forward", "backward"):
            assert span.end_ns - span.start_ns == (first_ns, last_ns)[span.rank]
        if span.op in ("send", "recv"):
            assert span.end_ns == span.start_ns or span.op == "recv", "communication takes no time"
    # 1F1B on two stages: the last stage works from L^1 on without a pause, then the first has one backward left.
    assert run.timeline.makespan_ns == 2 * first_ns + 4 * last_ns


def test_layouts_divide_base_ops(tiny_state: Any, tiny_workload: Any) -> None:
    """Shards are t_o / N_g: flops over 2 where tp = 2."""

    class Flops(Tokens):
        def latency(self, op: Op, device: DeviceSpec, share: tuple[Op, ...] = ()) -> Cost:
            return Cost(p50_ns=op.flops if op.family == "linear" else 0)

    workload = tiny_workload(1)
    found = []
    for tp in (1, 2):
        state = tiny_state(workload, tp=tp, cluster="4xA40")
        cost = Surrogate(Paper(base=Flops(1.0)), state, "pad").microbatch(("t0",))
        assert cost is not None
        found.append(cost.forward_ns[0])
    assert found[0] == 2 * found[1]


def test_messages_and_host_work_take_no_time_and_backward_is_forward() -> None:
    cost = Paper()
    assert (cost.model_id, cost.calibrated) == ("paper:roofline", False)
    assert Paper(base=Tokens(1.0)).calibrated
    for op in (ops.host("launch"), ops.message("send", 8), ops.message("all_reduce", 8, (2,))):
        assert cost.latency(op, A40) == Cost(p50_ns=0)
    assert cost.link_latency(ops.message("p2p", 10**9), LINKS["ib"]).p50_ns == 0
    for forward, backward in (
        (ops.linear(64, (8, 16), False, "forward", "fp16", 2), ops.linear(64, (8, 16), False, "backward", "fp16", 2)),
        (ops.lora(64, (8, 16), 4, "forward", "fp16", 2), ops.lora(64, (8, 16), 4, "weights", "fp16", 2)),
        (ops.attention(2, 64, (4, 2, 8), "forward", "fp16", 2), ops.attention(2, 64, (4, 2, 8), "backward", "fp16", 2)),
        (
            ops.pointwise("gelu", 64, (8,), 2, 5, "forward", "fp16", 2),
            ops.pointwise("gelu", 64, (8,), 2, 5, "backward", "fp16", 2),
        ),
    ):
        assert forward_of(backward) == forward_of(forward) == forward
        assert cost.latency(backward, A40) == replace(Roofline().latency(forward, A40), host_ns=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4)])
def test_the_backward_runs_the_forward_s_operators(shape: tuple[int, int], tiny_state: Any) -> None:
    """On every stage, the first one included, where the measured catalogue has no gradient above the first adapter."""
    state = tiny_state(tp=shape[0], pp=shape[1], cluster="4xA40")
    surrogate = Surrogate(Paper(), state, "pad")
    batch = surrogate.shape(TASKS).row_batch()
    for context in stage_contexts(state.workload, state.layout):
        both = [batch_ops(context, batch, way, Paper()) for way in ("forward", "backward")]  # type: ignore[arg-type]
        listed = [sorted(map(repr, (op for op in found if op.dtype not in ("host", "bytes")))) for found in both]
        assert listed[0] == listed[1]
        times = [stage_latency_ns(Paper(), A40, context, batch, way) for way in ("forward", "backward")]  # type: ignore[arg-type]
        assert times[0] == times[1]


def test_results_say_that_the_base_is_uncalibrated(tiny_state: Any) -> None:
    state = tiny_state(cluster="1xA40")
    instance = make_instance(state, "all", [["t0", "t1", "t2", "t3"]], [[0]])
    found = estimate(Plan(workload=state.workload, cluster=state.cluster, instances=(instance,)), Paper(), seed=0)
    assert (found.cost_model, found.calibrated, found.exposed_comm_fraction) == ("paper:roofline", False, 0.0)
