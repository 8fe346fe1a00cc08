"""The layer spec: what a probe of Transformer Engine decides, what Megatron then builds from, and (on a GPU) equal losses."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from muxtune.executor.group import WorkerGroup
from muxtune.executor.layer_spec import PACKAGE, VARIABLE, choose_layer_spec
from muxtune.executor.session import Session
from muxtune.policies.base import SystemState
from muxtune.policies.build import make_instance
from muxtune.spec.errors import InputError
from muxtune.spec.layout import even_layout
from muxtune.spec.plan import Plan


def probe(outcome: Exception | None) -> Any:
    def load(name: str) -> None:
        assert name == "transformer_engine.pytorch"
        if outcome is not None:
            raise outcome

    return load


@pytest.fixture(autouse=True)
def unhidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a probe hides comes back after the test."""
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    monkeypatch.delitem(sys.modules, PACKAGE)


@pytest.mark.parametrize(
    ("wanted", "outcome", "cuda", "kind", "reason"),
    [
        ("auto", None, True, "te", "works here"),
        ("te", None, True, "te", "works here"),
        ("local", None, True, "local", "asked for"),
        ("auto", None, False, "local", "a CUDA device is not"),
        ("auto", ModuleNotFoundError(PACKAGE), True, "local", "not installed"),
        ("auto", RuntimeError("cudnn shared object not found."), True, "local", "broken (RuntimeError: cudnn"),
        ("local", OSError("no .so"), False, "local", "broken (OSError: no .so)"),
    ],
)
def test_the_probe_decides(wanted: str, outcome: Exception | None, cuda: bool, kind: str, reason: str) -> None:
    found = choose_layer_spec(wanted, probe(outcome), cuda)
    assert found.kind == kind
    assert reason in found.reason
    hidden = outcome is not None and not isinstance(outcome, ImportError)
    assert (PACKAGE in sys.modules) == hidden
    if hidden:
        with pytest.raises(ImportError):
            importlib.import_module(PACKAGE)


def test_what_was_asked_for_and_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="layer spec te: transformer_engine is not installed: use auto or local"):
        choose_layer_spec("te", probe(ImportError()), True)
    with pytest.raises(InputError, match=f"{VARIABLE}='fast': known are auto, te, local"):
        choose_layer_spec("fast", probe(None), True)


def test_norms_come_from_the_spec_and_linears_stay_ours() -> None:
    from muxtune.executor.megatron import MultiplexedColumn, MultiplexedRow, RaggedAttention, spec_provider  # noqa: PLC0415

    class TheirNorm:
        pass

    class TheirProvider:
        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
            return TheirNorm

        def column_parallel_linear(self) -> type:
            raise AssertionError("adapters need our linears")

        row_parallel_linear = core_attention = fuse_layernorm_and_linear = column_parallel_linear

    for kind, ours in (("te", False), ("local", True)):
        provider = spec_provider(kind, lambda: TheirProvider)
        assert (provider.layer_norm(rms_norm=True) is not TheirNorm) == ours
        assert provider.column_parallel_linear() is MultiplexedColumn
        assert provider.row_parallel_linear() is MultiplexedRow
        assert provider.core_attention() is RaggedAttention
        assert provider.fuse_layernorm_and_linear() is False


@pytest.mark.dist
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec(PACKAGE) is None,
    reason="pending: needs a CUDA device with Transformer Engine, and has not run on one yet (profiles/README.md)",
)
def test_losses_are_those_of_the_local_spec(tiny_workload: Any, tiny_state: Any) -> None:
    found = {}
    for name in ("te", "local"):
        state: SystemState = tiny_state(tiny_workload(2), pp=1, cluster="1xH100")
        instance = make_instance(state, "i", [["t0", "t1"]], [[0]])
        plan = Plan(workload=state.workload, cluster=state.cluster, instances=(instance,))
        with WorkerGroup(even_layout(state.workload.model), "cuda", environment={VARIABLE: name}) as workers:
            session = Session(workers, plan, seed=1)
            for _ in range(5):
                session.iterate()
            found[name] = {t: [r.loss for r in reports] for t, reports in session.curves().items()}
    for task, losses in found["local"].items():
        assert found["te"][task] == pytest.approx(losses, abs=1e-4)
