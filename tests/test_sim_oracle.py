"""Both engines against a brute-force calculator that shares nothing with them: equal to the nanosecond."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.sim.pipeline import run_pipeline
from muxtune.sim.priced import price
from muxtune.sim.recurrence import recur, recur_blocks
from muxtune.sim.simulate import simulate
from muxtune.sim.stage import StageCache
from muxtune.sim.streams import run_blocks
from muxtune.spec.check import check
from tests.oracle import Worker, advance, answer
from tests.programs import Noise, programs


def test_the_calculator_by_hand() -> None:
    # b needs a (0..3) and its worker from 0 on; c follows b on the same worker; d needs c and takes no time.
    first, second = Worker(), Worker()
    a = first.give(3)
    b = second.give(4, [a])
    c = second.give(5)
    d = first.give(0, [c])
    advance([first, second])
    assert [(x.start_ns, x.end_ns) for x in (a, b, c, d)] == [(0, 3), (3, 7), (7, 12), (12, 12)]


@settings(max_examples=200)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_engines_agree_with_brute_force_on_random_small_programs(
    tiny_workload: Any, tiny_state: Any, data: Any, seed: int
) -> None:
    bound, cost = data.draw(programs(tiny_workload, tiny_state)), Noise(seed)
    assert [p for p in check(bound.plan) if "does not fit" not in p] == []
    found = answer(bound, cost)
    times, _ = run_pipeline(price(bound, cost, StageCache(cost, run_blocks)))
    assert times == found.times
    assert recur(price(bound, cost, StageCache(cost, recur_blocks))) == found.times
    spans = [s for s in simulate(bound, cost).timeline.spans if s.subgraph >= 0]
    assert sorted((s.rank, s.index, s.subgraph, s.start_ns, s.end_ns) for s in spans) == sorted(
        (rank, index, subgraph, *times) for (rank, index, _, subgraph), times in found.spans.items()
    )
