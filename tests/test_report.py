"""Reports and plots: self-contained, well formed, deterministic, and safe against any name."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from muxtune.experiments.commands.report import PAIRS, RESULT, read_study, run, write_pairs
from muxtune.experiments.console import json_text
from muxtune.experiments.plots import study as plots
from muxtune.experiments.plots.lanes import LANE_KINDS
from muxtune.experiments.report import headline, write_report
from muxtune.experiments.result import Pair, PlanRow, Ranking, StudyResult
from muxtune.policies.base import make_policy
from muxtune.profiler.provenance import Birth
from muxtune.sim.cost.roofline import Roofline
from muxtune.sim.cost.table import FamilyError
from muxtune.sim.simulate import simulate
from muxtune.spec.bind import bind
from muxtune.spec.errors import InputError
from muxtune.spec.metrics import bubble_fraction, compare_causes, compare_operators
from muxtune.spec.noun import digest

POLICIES = ("hf-peft", "sl-peft", "muxtune")
#: Measured over predicted time of each policy.
SLOWER = {"hf-peft": 1.1, "sl-peft": 1.02, "muxtune": 0.95}
HOSTILE = "<script>alert('x')</script>&\"$\\frac{1}{2}$ --> 模型 " + "w" * 80


def stretched(timeline, factor):
    spans = (replace(s, start_ns=round(s.start_ns * factor), end_ns=round(s.end_ns * factor)) for s in timeline.spans)
    return replace(timeline, source="executor", spans=tuple(spans))


def plan_row(workload, layout, policy, plan, simulation, measured):
    found = simulation.estimate
    measured_ns = measured.iteration_ns
    return PlanRow(
        workload=workload,
        layout=layout,
        policy=policy,
        plan_digest=digest(plan),
        program_digest=simulation.timeline.program_digest,
        predicted_ns=found.iteration_ns,
        measured_ns=measured_ns,
        error=found.iteration_ns / measured_ns - 1,
        noise=0.01,
        relative_error=0.05,
        extrapolated_fraction=0.0,
        rounds=20,
        billed_tokens_per_s=found.billed_tokens * 1e9 / measured_ns,
        processed_tokens_per_s=found.processed_tokens * 1e9 / measured_ns,
        predicted_billed_tokens_per_s=found.rate_per_s(found.billed_tokens),
        predicted_peak_bytes=found.peak_bytes,
        measured_peak_bytes=tuple(round(1.05 * b) for b in found.peak_bytes),
        predicted_bubble=found.bubble_fraction,
        measured_bubble=bubble_fraction(measured),
        plan_seconds=0.01,
        causes=compare_causes(simulation.timeline, measured),
        operators=compare_operators(simulation.timeline, measured),
    )


@pytest.fixture(scope="module")
def study(tiny_state):
    """(result, pairs) of three policies on two layouts, simulated; `measured` is the prediction, stretched."""
    rows, pairs, rankings = [], [], []
    for pp in (1, 2):
        state, layout = tiny_state(pp=pp), f"pp={pp}"
        for policy in POLICIES:
            plan = make_policy(policy, Roofline()).plan(state)
            simulation = simulate(bind(plan, seed=0), Roofline())
            measured = stretched(simulation.timeline, SLOWER[policy])
            rows.append(plan_row("tiny", layout, policy, plan, simulation, measured))
            pairs.append(
                Pair(workload="tiny", layout=layout, policy=policy, predicted=simulation.timeline, measured=measured)
            )
        rankings.append(ranking("tiny", layout, rows[-len(POLICIES) :]))
    families = (
        FamilyError(family="linear", points=12, held_out_mape=0.04),
        FamilyError(family="launch", points=1, held_out_mape=None),
    )
    born = Birth(
        device="A CPU",
        driver="Linux",
        host="x86_64",
        cores=2,
        libraries=("torch==2",),
        revision="abc",
        command="muxtune demo",
    )
    result = StudyResult(
        device="cpu",
        complete=True,
        rows=tuple(rows),
        rankings=tuple(rankings),
        families=families,
        fitted_on="single operators",
        held_out="every plan",
        reference_ns=1_000_000,
        provenance=born,
        seconds=60.0,
    )
    return result, pairs


def ranking(workload, layout, rows):
    winner = min(rows, key=lambda r: r.measured_ns)
    gains = tuple((r.policy, r.measured_ns / winner.measured_ns) for r in rows if r.policy in ("hf-peft", "sl-peft"))
    return Ranking(
        workload=workload,
        layout=layout,
        kendall_tau=1.0,
        resolved_tau=None,
        unresolved=0.25,
        predicted_winner=min(rows, key=lambda r: r.predicted_ns).policy,
        winner=winner.policy,
        speedup_over=gains,
    )


class Page(HTMLParser):
    """Checks that tags nest, and collects links, ids and the text outside pictures."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.links, self.ids, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [v for k, v in attributes if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "svg" not in self.open and "style" not in self.open:
            self.text += data


def page_of(result, pairs, folder):
    write_report(result, pairs, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_is_whole_and_needs_nothing_else(study, tmp_path):
    result, pairs = study
    text = page_of(result, pairs, tmp_path)
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in text
    assert "@import" not in text
    assert "script" not in page.tags
    assert page.tags.count("svg") == 5 + len(study[1])
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_page_says_what_was_found(study, tmp_path):
    result, pairs = study
    text = Page(page_of(result, pairs, tmp_path)).text
    assert headline(result) in text
    for row in result.rows:
        assert f"{row.error:+.1%}" in text
        assert f"{row.processed_tokens_per_s:,.0f}" in text
    assert f"Worst plan: {result.worst.policy}" in text
    assert "Held out: every plan." in text
    assert "unvalidated" in text
    assert "any GPU" in text
    assert "muxtune demo" in text
    assert "Partial result" not in text


def test_headline_counts_wins_and_gains(study):
    result, _ = study
    both = tuple(
        replace(r, winner="muxtune", predicted_winner=p, speedup_over=(("hf-peft", g), ("sl-peft", 2.0)))
        for r, g, p in zip(result.rankings, (1.5, 1.25), ("muxtune", "sl-peft"), strict=True)
    )
    assert headline(replace(result, rankings=both)) == (
        "muxtune was the fastest policy in 2 of 2 comparisons: 1.25–1.50× over hf-peft, 2.00× over sl-peft. "
        "The simulator named the winner in 1 of 2."
    )


def test_a_lead_within_noise_is_said_to_be_one(study, tmp_path):
    result, pairs = study
    noisy = tuple(replace(r, noise=9.0) for r in result.rows)
    assert "within the noise" in Page(page_of(replace(result, rows=noisy), pairs, tmp_path)).text


def test_errors_beyond_the_target_are_marked(study, tmp_path):
    result, _ = study
    rows = (replace(result.rows[0], error=0.125, noise=0.004), replace(result.rows[1], error=-0.125, noise=0.006))
    text = page_of(replace(result, rows=rows, rankings=result.rankings[:1]), [], tmp_path)
    assert re.findall(r"<td class=off>(.*?)</td>", text) == ["+12.5%"]
    assert "1 of 2" in Page(text).text


def test_partial_and_empty_results_are_pages(study, tmp_path):
    result, pairs = study
    part = replace(result, complete=False, rows=result.rows[:1], rankings=(), families=())
    assert "Partial result" in Page(page_of(part, pairs[:1], tmp_path)).text
    nothing = replace(part, rows=())
    assert "No plan was measured yet." in Page(page_of(nothing, [], tmp_path)).text


def test_names_are_shown_not_obeyed(study, tmp_path):
    result, pairs = study
    rows = tuple(replace(r, workload=HOSTILE, policy=HOSTILE + r.policy, layout=HOSTILE) for r in result.rows)
    rankings = (ranking(HOSTILE, HOSTILE, rows),)
    named = [replace(p, workload=HOSTILE, layout=HOSTILE, policy=HOSTILE + p.policy) for p in pairs]
    families = (FamilyError(family=HOSTILE, points=3, held_out_mape=0.5),)
    born = replace(result.provenance, command=HOSTILE, device=HOSTILE)
    hostile = replace(result, rows=rows, rankings=rankings, families=families, provenance=born, held_out=HOSTILE)
    text = page_of(hostile, named, tmp_path)
    page = Page(text)
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert "<script" not in text


def pictures(study):
    result, pairs = study
    yield plots.scatter(result.rows)
    yield plots.families(result.families)
    yield plots.causes(result.rows)
    yield plots.operators(result.rows)
    yield plots.memory(result.rows)
    yield from (plots.pipeline(p) for p in pairs)


def test_pictures_are_valid_and_the_same_twice(study):
    first, second = list(pictures(study)), list(pictures(study))
    assert first == second
    for svg in first:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<metadata" not in svg


def test_pictures_of_nothing_are_empty():
    assert plots.scatter([]) == plots.families([]) == plots.causes([]) == plots.operators([]) == plots.memory([]) == ""


def test_wide_ranges_get_logarithmic_axes(study):
    rows = study[0].rows
    far = (*rows, replace(rows[0], predicted_ns=100 * rows[0].predicted_ns, measured_ns=90 * rows[0].measured_ns))
    near, wide = (plots._scatter(r).axes[0] for r in (rows[:2], far))
    assert (near.get_xscale(), wide.get_xscale()) == ("linear", "log")
    assert wide.get_xlim() == wide.get_ylim()


def test_gantt_lanes_hold_every_forward_and_backward(study):
    pair = study[1][-1]
    top, bottom = plots._pipeline(pair).axes
    assert top.get_xlim() == bottom.get_xlim()
    for axes, timeline in ((top, pair.predicted), (bottom, pair.measured)):
        assert [t.get_text() for t in axes.get_yticklabels()] == ["rank 0", "rank 1"]
        drawn = sum(
            len(c.get_paths())
            for c in axes.collections
            if np.allclose(np.asarray(c.get_facecolor())[0, :3], rgb("forward"))
        )
        assert drawn == sum(s.op == "forward" and s.subgraph < 0 for s in timeline.spans)


def rgb(kind):
    colour = next(c for name, _, c in LANE_KINDS if name == kind)
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_report_command_draws_the_same_page_again(study, tmp_path):
    result, pairs = study
    first = page_of(result, pairs, tmp_path)
    (tmp_path / RESULT).write_text(json_text(result.as_json()))
    write_pairs(pairs, tmp_path)
    assert read_study(tmp_path)[0] == result
    body = run(tmp_path, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == first
    assert body["pictures"] == len(pairs)
    (tmp_path / PAIRS).unlink()
    assert run(tmp_path)["pictures"] == 0
    (tmp_path / RESULT).write_text("{}")
    with pytest.raises(InputError, match=r"result.json: .*missing"):
        run(tmp_path)
