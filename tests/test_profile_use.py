"""A profile in use: how sure its medians are, what it covers, when it is taken by itself, what its page shows."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from muxtune.experiments.commands import costs
from muxtune.experiments.commands.catalog import run as listing
from muxtune.experiments.commands.costs import choose_cost
from muxtune.experiments.commands.inputs import COSTS
from muxtune.experiments.commands.profile import parse_budget
from muxtune.experiments.plots.profile import page
from muxtune.profiler.cases import message_sizes, needed_cases
from muxtune.profiler.coverage import missing
from muxtune.profiler.fit import fit
from muxtune.profiler.noise import median_half_width, median_interval, settled
from muxtune.profiler.provenance import birth, foreign
from muxtune.profiler.run import Budget
from muxtune.profiler.store import Meta, Store
from muxtune.sim.cost.table import FittedTable, residuals
from muxtune.spec.cluster import device_presets, parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.files import write_noun
from muxtune.spec.layout import Layout, even_layout
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task, Workload

MODEL = model_preset("tiny-test")
CPU = device_presets()["cpu"]
LAYOUTS = [even_layout(MODEL), even_layout(MODEL, pp=2)]


def workload(rank: int = 4, samples: int = 2) -> Workload:
    peft = LoRA(rank=rank)
    task = Task(task_id="a", peft=peft, dataset="sst2", billed_len_tokens=32, global_batch_samples=samples)
    return Workload(name="w", model=MODEL, datasets=(embedded_length("sst2"),), tasks=(task,))


def meta() -> Meta:
    cases, sizes = needed_cases([workload()], LAYOUTS), message_sizes([workload()])
    born = birth("cpu")
    return Meta(device="cpu", model=MODEL, cases=cases, message_bytes=sizes, meeting_ranks=(2,), provenance=born)


def made_up_rows(noise: float, number: int) -> list[tuple[int, str, int, int, int]]:
    """A round of a machine on which every operator takes 2 µs and 300 ns a unit of size, give or take `noise`."""
    found, draw = meta(), np.random.default_rng(number)
    rows: list[tuple[int, str, int, int, int]] = []

    def add(index: int, direction: str, ns: float) -> None:
        took = max(1, round(ns * (1 + noise * draw.uniform(-1, 1))))
        rows.append((index, direction, took, took, 300_000))

    for index, case in enumerate(found.cases):
        parts = ("", ".attention", ".mlp") if case.family == "passage" else ("",)
        for direction in ("weights",) if case.direction == "weights" else ("forward", "backward"):
            for part in parts:
                add(index, direction + part, 2_000 + 300 * math.prod(case.size))
    for offset, size_bytes in enumerate(found.message_bytes, start=len(found.cases)):
        for family in ("send", "p2p", "recv"):
            add(offset, family, 10_000 + size_bytes)
    add(len(found.cases) + len(found.message_bytes), "all_reduce", 90_000)
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(tmp_path / "profiles" / "here")
    store.open(meta())
    for number in range(8):
        store.append(number, made_up_rows(0.001, number), steal_percent=float(number), revision="r1")
    write_noun(fit(store.folder, workload().tasks), store.folder / COSTS)
    return store.folder


@pytest.fixture
def root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(costs, "profile_roots", lambda: (folder.parent,))
    return folder.parent


class TestMedian:
    def test_too_few_values_tell_nothing(self) -> None:
        assert median_half_width([1.0] * 5) == math.inf
        assert median_half_width([1.0] * 6) == 0.0

    def test_interval_by_hand(self) -> None:
        """Of 10 values the 2nd and the 9th: 1 − 2·(1 + 10)/1024 = 97.9 %, the 3rd and the 8th would be 89.1 %."""
        values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
        assert median_half_width(values) == pytest.approx((9 - 2) / 2 / 5.5)

    @pytest.mark.parametrize("count", [6, 8, 10, 12])
    def test_the_true_median_is_inside(self, count: int) -> None:
        """Over all ways in which values may lie above or below a median of 0."""
        inside = 0
        for signs in product((-1, 1), repeat=count):
            low, high = median_interval([sign * (i + 1.0) for i, sign in enumerate(signs)])
            inside += low <= 0 <= high
        assert inside / 2**count >= 0.95

    def test_noisy_points_are_named(self) -> None:
        rows = pd.DataFrame(
            [(c, "forward", 100 + (37 * i % 11 if c else 0), 100) for c in (0, 1) for i in range(10)],
            columns=["case", "direction", "wall_ns", "reference_ns"],
        )
        found = settled(rows)
        assert (found.points, found.settled, found.all) == (2, 1, False)
        assert [(case, direction) for case, direction, _ in found.worst] == [(1, "forward")]


class TestBudget:
    def test_times(self) -> None:
        assert [parse_budget(t) for t in ("", "90s", "5m", "1.5h")] == [None, 90.0, 300.0, 5400.0]
        for wrong in ("5", "m", "0s", "5 days"):
            with pytest.raises(InputError, match=f"--budget {wrong}: give a time such as 90s"):
                parse_budget(wrong)

    def test_one_round_is_always_measured(self, folder: Path) -> None:
        over = Budget(deadline_s=0.0)
        assert over.spent(Store(folder), 0) == ""
        assert over.spent(Store(folder), 1) == "the budget ended after 1 rounds"

    def test_stops_when_every_median_is_known(self, folder: Path) -> None:
        assert Budget(precision=0.02).spent(Store(folder), 8) == "every median was known to 2% after 8 rounds"
        assert Budget(precision=1e-6).spent(Store(folder), 8) == ""


class TestStore:
    def test_packed_rounds_are_counted_once(self, folder: Path) -> None:
        store, before = Store(folder), Store(folder).rows()
        store.pack()
        assert sorted(p.name for p in folder.iterdir()) == ["costs.json", "meta.json", "rows.parquet"]
        pd.testing.assert_frame_equal(store.rows(), before)
        store.append(3, made_up_rows(0.0, 3))  # left behind by a kill while packing
        assert store.open(meta()) == 8
        pd.testing.assert_frame_equal(store.rows(), before)
        store.append(8, made_up_rows(0.0, 8))
        assert store.open(meta()) == 9
        assert sorted(store.rows()["round"].unique()) == list(range(9))

    def test_revisions_and_steal_stand_in_the_rows(self, folder: Path) -> None:
        assert Store(folder).rows().groupby("round")["steal_percent"].first().tolist() == [float(n) for n in range(8)]
        assert fit(folder, workload().tasks).provenance.environment.endswith("revision r1")

    def test_another_machine_cannot_go_on(self, folder: Path) -> None:
        other = replace(meta(), provenance=replace(birth("cpu"), device="another CPU"))
        with pytest.raises(InputError, match="another workload, machine or library versions"):
            Store(folder).open(other)


class TestCoverage:
    @pytest.fixture
    def fitted(self, folder: Path) -> FittedTable:
        return fit(folder, workload().tasks)

    def test_what_was_measured_is_covered(self, fitted: FittedTable) -> None:
        assert missing(fitted, workload(), LAYOUTS) == ()

    def test_lacks_are_named(self, fitted: FittedTable) -> None:
        assert any(text.startswith("lora forward fp32") for text in missing(fitted, workload(rank=16), LAYOUTS))
        assert any("of 8..512 (measured 8..64)" in text for text in missing(fitted, workload(samples=16), LAYOUTS))
        three = [Layout(pp=4, layers_per_stage=(1, 1, 1, 1))]
        assert "the meeting of 4 ranks" in missing(fitted, replace(workload(), model=MODEL), three)
        sharded = [even_layout(MODEL, tp=2)]
        said = missing(fitted, workload(), sharded)
        assert any(text.startswith("linear forward fp32 24x32x0") for text in said)
        assert any(text.startswith("all_reduce forward bytes 2 of") for text in said)


class TestAuto:
    def test_a_profile_that_covers_is_taken(self, root: Path) -> None:
        found = choose_cost("auto", parse_cluster("2xcpu"), workload(), LAYOUTS)
        assert found.model.calibrated
        assert found.body()["why"] == "auto: recorded profile here"
        assert found.notes == ()

    def test_else_the_roofline_and_why(self, root: Path) -> None:
        other = choose_cost("auto", parse_cluster("2xcpu"), workload(rank=16), LAYOUTS)
        assert other.model.model_id == "roofline"
        assert other.why == "auto: here lacks adamw forward fp32 8 of 5888..5888 (measured 1472..1472) and 6 more"
        foreign_model = replace(workload(), model=model_preset("tiny-llama"))
        assert choose_cost("auto", parse_cluster("cpu"), foreign_model, LAYOUTS[:1]).why == (
            "auto: here lacks figures of tiny-llama"
        )
        assert choose_cost("auto", parse_cluster("1xA40"), workload(), LAYOUTS[:1]).why == (
            "auto: no recorded profile of A40"
        )

    def test_figures_of_another_machine_say_so(self, root: Path) -> None:
        born = replace(birth("cpu"), device="another CPU", libraries=("torch==1.0", *birth("cpu").libraries[1:]))
        write_noun(replace(meta(), provenance=born), root / "here" / "meta.json")
        machine, versions = choose_cost("auto", parse_cluster("cpu"), workload(), LAYOUTS[:1]).notes
        assert machine.startswith("measured on another CPU, this machine is ")
        assert versions.startswith("measured with torch==1.0 (here torch==")
        named = choose_cost(str(root / "here"), parse_cluster("cpu"), workload(), LAYOUTS[:1])
        assert (named.why, named.notes) == ("", (machine, versions))
        assert foreign(birth("cpu")) == ()

    def test_list_shows_coverage(self, root: Path) -> None:
        (row,) = listing("profiles")["profiles"]
        assert (row["name"], row["device"], row["model"], row["tokens"]) == ("here", "cpu", "tiny-test", "8..64")
        assert row["points"] > row["groups"] > row["families"] > 10


def test_the_page_shows_every_family_and_every_residual(folder: Path) -> None:
    fitted = fit(folder, workload().tasks)
    text = page(fitted, "here")
    assert text.count("<h2>") == text.count("<svg") == len(fitted.families)
    assert "http" not in text.replace("http://www.w3.org", "")
    left_out = [size for c in fitted.curves if c.family == "linear" for size, _ in residuals(c, CPU)]
    assert sorted(set(left_out)) == [(16,), (32,)]
    assert page(fitted, "here") == text
