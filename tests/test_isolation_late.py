"""Isolation of tasks that join late and of tasks with dropout: gradients and losses are those of the task alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muxtune.executor.group import WorkerGroup
from muxtune.executor.messages import Call, Gradients
from muxtune.executor.session import NAME, Session
from muxtune.spec.plan import Plan
from tests.test_isolation import ALIGNMENTS, GROUPINGS, Found, assert_equal, curves, gradients, make_plan, train, whole

pytestmark = pytest.mark.dist

LAYOUTS = ("1 rank", "tp=2", "pp=2", "tp=2 pp=2")
BEFORE, AFTER = 2, 4
Losses = dict[str, list[float | None]]


def dropping(*plan: Any) -> Plan:
    """A plan of `make_plan` whose tasks drop 30 % of their adapters' inputs, each by a seed of its own."""
    made = make_plan(*plan)
    tasks = tuple(replace(t, peft=replace(t.peft, dropout=0.3)) for t in made.workload.tasks)
    return replace(made, workload=replace(made.workload, tasks=tasks))


def alone(task: str) -> Plan:
    """The task by itself on one rank, padded."""
    return dropping("1 rank", [[task]])


@pytest.fixture(scope="module")
def solo(rank_pool: Any) -> Found:
    return {t: gradients(rank_pool.get(), alone(t))[t] for t in "abc"}


@pytest.fixture(scope="module")
def solo_curves(rank_pool: Any) -> dict[str, tuple[float, ...]]:
    return {t: curves(train(rank_pool.get(), alone(t), AFTER))[t] for t in "abc"}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_under_dropout_are_those_of_the_task_alone(
    workers: WorkerGroup, solo: Found, layout: str, alignment: str
) -> None:
    assert_equal(gradients(workers, dropping(layout, *GROUPINGS["interleaved"], alignment)), solo)


def test_dropout_changes_every_gradient(workers: WorkerGroup, solo: Found) -> None:
    """Or the tests above would compare nothing."""
    for task, found in gradients(workers, make_plan("1 rank", *GROUPINGS["fused"])).items():
        with pytest.raises(AssertionError):
            assert_equal({task: found}, {task: solo[task]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_curves_under_dropout_are_those_of_the_task_alone(
    workers: WorkerGroup, solo_curves: dict[str, tuple[float, ...]], layout: str
) -> None:
    found = curves(train(workers, dropping(layout, *GROUPINGS["interleaved"], "chunks"), AFTER))
    for task, expected in solo_curves.items():
        assert found[task] == pytest.approx(expected, abs=1e-4)


def losses(session: Session) -> Losses:
    """Curves of a session by task."""
    return {task: [r.loss for r in reports] for task, reports in session.curves().items()}


def pass_gradients(workers: WorkerGroup, session: Session) -> Found:
    """Gradients of the samples that come next, at random adapters: a step's rounding cannot enter."""
    workers.ask(Call(function="in_worker:give_adapters", arguments=(NAME,)))
    return whole(session.plan, workers.ask(Gradients(name=NAME)))


def run(session: Session, iterations: int) -> Session:
    for _ in range(iterations):
        session.iterate()
    return session


def rebound(session: Session) -> Session:
    """The session with its next Program on the ranks, as after a change of plan."""
    session.replan(session.plan)
    return session


@pytest.fixture(scope="module")
def solo_sessions(rank_pool: Any) -> tuple[Found, Losses]:
    """Gradients where each task is when `c` joins, and the curve of `AFTER` more steps."""
    found: Found = {}
    expected: Losses = {}
    for task, before in (("a", BEFORE), ("b", BEFORE), ("c", 0)):
        session = rebound(run(Session(rank_pool.get(), alone(task), seed=3), before))
        found |= pass_gradients(rank_pool.get(), session)
        expected |= losses(run(Session(rank_pool.get(), alone(task), seed=3), before + AFTER))
    return found, expected


@pytest.mark.parametrize("alignment", ["pad", "chunks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_task_that_joins_late_and_those_it_joins_train_as_each_alone(
    workers: WorkerGroup, solo_sessions: tuple[Found, Losses], layout: str, alignment: str
) -> None:
    """`c` joins at its step 0, in one hTask with `b`, where the others are at their step 2; all with dropout."""
    plans = [dropping(layout, groups, [[1, 0]], alignment) for groups in ([["a"], ["b"]], [["a"], ["b", "c"]])]

    def joined() -> Session:
        session = run(Session(workers, plans[0], seed=3), BEFORE)
        assert session.register_tasks(plans[1]).joined == ("c",)
        return session

    assert_equal(pass_gradients(workers, joined()), solo_sessions[0])
    curve = losses(run(joined(), AFTER))
    for task, expected in solo_sessions[1].items():
        assert curve[task] == pytest.approx(expected, abs=1e-4)
