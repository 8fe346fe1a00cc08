"""search: the simulator in the loop, anytime. Late-acceptance hill climbing from the best of the other policies' plans.

Burke and Bykov (2017): a neighbour is accepted if it is no worse than the current candidate, or than the one `MEMORY` turns
ago. Of a few neighbours the one whose eager template is shortest is evaluated. The best plan seen is returned, so it is never
worse than any of the starts. Better is what the state's goal ranks first: less iteration time, unless it says otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from muxtune.policies.base import Policy, SystemState, make_policy, policies, require_evaluate
from muxtune.policies.candidates import Builder, Candidate, Draft, candidate_of
from muxtune.policies.moves import Freedom, chunk_sizes, neighbour
from muxtune.spec.align import ALIGNMENTS, Alignment
from muxtune.spec.errors import InfeasibleError, NoAnswerError
from muxtune.spec.layout import LayoutChoice
from muxtune.spec.noun import noun
from muxtune.spec.plan import Plan, SolverRecord
from muxtune.spec.units import format_ns

#: Policies whose plans it starts from; those that are not there are left out.
STARTS = (
    *("muxtune", "muxtune:charge=exact", "greedy", "ilp", "sl-peft", "temporal"),
    *("hf-peft", "nemo", "lorafusion"),
)
#: The same with another alignment, where candidates may use it.
ALIGNED_STARTS = ("muxtune:alignment={}", "muxtune:alignment={},charge=exact")
MEMORY = 16
#: Neighbours that are drawn for each that is evaluated.
PROPOSALS = 6
#: Turns in a row without anything new to evaluate before the search moves KICK_MOVES away; after KICKS of them it gives up.
STALE, KICKS, KICK_MOVES = 10, 6, 4

Alignments = Literal["pad", "varlen", "chunk", "any"]
#: See `Goal.rank`.
Rank = tuple[float, float, int]


@noun
class SearchConfig:
    """`evaluations` is the budget in simulated Programs, starts included: a `varlen` plan costs one a draw (what
    nemo evaluates for itself is not counted).

    With `seconds` the clock may end the search sooner, and the result depends on it. `alignment` is what plans may use, starts
    included: one of them, or `any`, which moves between them.
    """

    evaluations: int = 300
    seconds: float | None = None
    alignment: Alignments = "any"

    def __post_init__(self) -> None:
        if self.alignment not in get_args(Alignments):
            raise ValueError(f"alignment={self.alignment!r}: known are {list(get_args(Alignments))}")
        if self.evaluations < 1 or (self.seconds is not None and self.seconds <= 0):
            raise ValueError(f"evaluations={self.evaluations}, seconds={self.seconds}: a budget must be above 0")


class Search(Policy):
    """Moves over partition, buckets, their order, the order of stages, alignment, and `state.choices` (layout and C).

    Candidates are plans of one shared instance whose samples are spread evenly; other plans (one backbone a task, packed
    samples) are starts that it keeps if nothing beats them.
    """

    Config = SearchConfig
    chooses_layout = True
    quick = "evaluations=24"

    def plan(self, state: SystemState) -> Plan:
        """The best plan found within the budget.

        Raises:
            InfeasibleError: no other policy has a plan, with the reason of the first.
            InputError: the state has no simulator.
        """
        run = _Run(self, state)
        run.start()
        run.climb()
        return run.best_plan()


class _Run:
    """One search; used once and thrown away."""

    def __init__(self, policy: Search, state: SystemState) -> None:
        self.policy, self.state, self.config = policy, state, policy.config
        self.evaluate = require_evaluate("search", state)
        self.builder = Builder(policy, "search", state)
        self.rng = np.random.default_rng(state.seed)
        alignments: tuple[Alignment, ...] = ALIGNMENTS if self.config.alignment == "any" else (self.config.alignment,)
        given = LayoutChoice(layout=state.layout, microbatches=state.microbatches)
        self.freedom = Freedom(
            choices=state.choices or (given,), alignments=alignments, chunk_tokens=chunk_sizes(state.workload)
        )
        self.evaluations = 0
        self.reached: dict[str, Rank] = {}
        self.seen: dict[Candidate, Rank | None] = {}
        self.best: tuple[Rank, Plan] | None = None
        self.refusal = ""
        self.ended = "the budget was spent"
        self.spent = _clock(self.config.seconds)

    def start(self) -> None:
        """Evaluate the plans of the other policies, under each choice as long as the budget lasts (half of it at most)."""
        known = policies()
        others = [a for a in self.freedom.alignments if a != "pad"]
        wanted = (*STARTS[:3], *(n.format(a) for a in others for n in ALIGNED_STARTS), *STARTS[3:])
        names = [n for n in wanted if n.partition(":")[0] in known]
        for name in names:
            chooser = known[name.partition(":")[0]].chooses_layout
            for choice in self.freedom.choices[:1] if chooser else self.freedom.choices:
                if self.best is not None and (2 * self.evaluations >= self.config.evaluations or self.spent()):
                    return
                self._start_from(name, choice, chooser)

    def _start_from(self, name: str, choice: LayoutChoice, chooser: bool) -> None:
        state = replace(self.state, layout=choice.layout, microbatches=choice.microbatches)
        if not chooser:
            state = replace(state, choices=())
        try:
            plan = make_policy(name, self.policy.cost).plan(state)
        except NoAnswerError as error:
            self.refusal = self.refusal or str(error)
            return
        if any(h.alignment not in self.freedom.alignments for i in plan.instances for h in i.htasks):
            return
        rank = self._judge(plan)
        if rank is None:
            return
        self.reached[name] = min(rank, self.reached.get(name, rank))
        candidate = candidate_of(plan)
        if candidate is not None:
            self.seen[candidate] = min(rank, self.seen.get(candidate) or rank)

    def _judge(self, plan: Plan) -> Rank | None:
        """Where the goal ranks a plan; None for one that cannot be executed or priced. Remembers the best."""
        try:
            found = self.evaluate(plan)
        except NoAnswerError as error:
            self.evaluations += 1
            self.refusal = self.refusal or str(error)
            return None
        self.evaluations += found.draws
        rank = self.state.rank(found)
        if self.best is None or rank < self.best[0]:
            self.best = (rank, plan)
        return rank

    def climb(self) -> None:
        """Late acceptance until the budget or the neighbourhood ends."""
        starts = [(value, i, c) for i, (c, value) in enumerate(self.seen.items()) if value is not None]
        if not starts:
            self.ended = "no start has a neighbourhood"
            return
        current_rank, _, current = min(starts, key=lambda x: x[:2])
        history = [current_rank] * MEMORY
        turn = stale = 0
        while self.evaluations < self.config.evaluations and not self.spent():
            found = self._proposal(current)
            if found is None:
                stale += 1
                if stale == KICKS * STALE:
                    self.ended = "the neighbourhood was exhausted"
                    return
                if stale % STALE == 0:
                    current = self._kicked(current)
                continue
            stale = 0
            candidate, plan = found
            rank = self.seen[candidate] = self._judge(plan)
            if rank is not None and rank <= max(current_rank, history[turn % MEMORY]):
                current, current_rank = candidate, rank
            history[turn % MEMORY] = current_rank
            turn += 1

    def _kicked(self, current: Candidate) -> Candidate:
        """A few moves away, whatever they cost: the next proposals are neighbours of that."""
        for _ in range(KICK_MOVES):
            current = neighbour(current, self.freedom, self.rng)
        return current

    def _proposal(self, current: Candidate) -> tuple[Candidate, Plan] | None:
        """The most promising of a few new neighbours; None if none of them is new and can be built."""
        drafts: list[tuple[int, int, Draft]] = []
        for index in range(PROPOSALS):
            candidate = neighbour(current, self.freedom, self.rng)
            if candidate in self.seen:
                continue
            try:
                found = self.builder.draft(candidate)
            except NoAnswerError:
                found = None
            if found is None:
                self.seen[candidate] = None
            else:
                drafts.append((found.template.makespan_ns, index, found))
        if not drafts:
            return None
        best = min(drafts, key=lambda x: x[:2])[2]
        return best.candidate, self.builder.plan(best)

    def best_plan(self) -> Plan:
        """The best plan, signed; its record says what the starts reached and why the search ended."""
        if self.best is None:
            raise InfeasibleError(f"policy search: no start is feasible: {self.refusal}")
        rank, plan = self.best
        starts = sorted(self.reached.items(), key=lambda x: x[1])
        reached = ", ".join(f"{name} {self._cost_text(start)}" for name, start in starts)
        record = SolverRecord(
            name="late-acceptance",
            status=f"{self.evaluations} evaluations, {self.ended}; {_gain(rank, starts[0][1])}; starts: {reached}",
            value_ns=rank[2],
            evaluations=self.evaluations,
            deterministic=self.config.seconds is None,
        )
        made_by = self.builder.signature()
        return replace(plan, made_by=replace(made_by, solver=record))

    def _cost_text(self, rank: Rank) -> str:
        """Iteration time, with the objective's cost where that is another."""
        time_text, objective = format_ns(rank[2]), self.state.goal.objective
        return time_text if objective == "throughput" else f"{time_text} ({objective} {rank[1]:.4g})"


def _gain(rank: Rank, start: Rank) -> str:
    """How far the cost is below that of the best start."""
    share = 1 - rank[1] / start[1] if 0 < start[1] < math.inf else 0.0
    return f"{100 * share:.1f} % below the best start"


def _clock(seconds: float | None) -> Callable[[], bool]:
    """Whether the seconds are over; never without a limit (no clock is read then)."""
    if seconds is None:
        return lambda: False
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_s
