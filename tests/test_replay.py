"""muxtune replay and sweep: the keys, several policies and seeds, resuming, sizing, partial results, wrong input."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments import spread
from muxtune.experiments.commands.replay import parse_costs, parse_faults
from muxtune.experiments.commands.sweep import read_grid
from muxtune.experiments.commands.trace import Given
from muxtune.experiments.main import main
from muxtune.experiments.replay_cell import Bench, Cell
from muxtune.experiments.replay_means import interval
from muxtune.experiments.replay_run import run_cell
from muxtune.experiments.replay_size import parse_goal, smallest
from muxtune.experiments.spread import Files, Keeper, in_worker, run_cells
from muxtune.sim.cluster.prices import Prices, Shelf
from muxtune.sim.traces.faults import read_faults
from muxtune.spec.cluster import parse_cluster
from muxtune.spec.errors import InputError, NoAnswerError
from muxtune.spec.fleet import FREE, Fault, InstanceShape, TaskType, task_type
from muxtune.spec.jobs import TraceHeader
from muxtune.spec.layout import even_layout
from muxtune.spec.model import model_preset
from tests.fleets import S, by_count, estimate_of, job, replayed, trace_of

KEYS = {
    *(
        "trace",
        "jobs",
        "gpus",
        "policy",
        "cluster_policy",
        "completed",
        "rejected",
        "failed",
        "makespan_s",
        "jct_s",
        "queue_s",
    ),
    *(
        "billed_tokens_per_s",
        "energy_j",
        "slo_attainment",
        "fairness",
        "replans",
        "events",
        "wall_s",
        "cpu_s",
        "digest",
    ),
}
#: Some 40 jobs of a quarter of an hour, on four GPUs.
TINY = Cell(
    given=Given(source="paper:days=0.01", mapping=(("mean", "10"), ("std", "10"), ("deadline_slack", "4"))),
    clusters=("4x1xA40",),
    policy="hf-peft",
    gpus_per_instance=1,
)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return run_cell(TINY)


def unclocked(body: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in body.items() if k not in ("wall_s", "cpu_s", "decision_us")}


def test_one_replay_has_the_keys_of_the_design(tiny: dict[str, Any]) -> None:
    assert set(tiny) >= KEYS
    assert set(tiny["jct_s"]) == {"mean", "p50", "p95", "p99"}
    assert tiny["completed"] == tiny["jobs"] > 20
    assert sum(tiny["gpu_share"].values()) == pytest.approx(1.0)
    assert 0 < tiny["slo_attainment"] <= 1
    assert any("invented columns" in text for text in tiny["statements"])
    assert any("solo step rate of hf-peft" in text for text in tiny["statements"])


def test_replays_are_equal_whatever_runs_them(tiny: dict[str, Any], tmp_path: Path) -> None:
    cells = [TINY, replace(TINY, cluster_policy="srtf")]
    here = run_cells(cells, keeper=Keeper(None, False))
    pool = run_cells(cells, jobs=2, keeper=Keeper(tmp_path, False, job_rows=True))
    assert [unclocked(b) for b in here] == [unclocked(b) for b in pool]
    assert unclocked(here[0]) == unclocked(tiny)
    assert sorted(p.name for p in tmp_path.glob("cells/*.json")) == sorted(f"{c.key}.json" for c in cells)
    for cell in cells:
        with (tmp_path / "cells" / f"{cell.key}.jobs.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == tiny["jobs"]
        assert {r["end"] for r in rows} == {"completed"}


def test_a_killed_run_goes_on(tiny: dict[str, Any], tmp_path: Path) -> None:
    cells = [TINY, replace(TINY, seed=1)]
    keeper = Keeper(tmp_path, True)
    keeper.keep(cells[0], {**tiny, "jobs": -1})
    keeper.keep(cells[1], {**tiny, "complete": False})
    found = run_cells(cells, keeper=keeper)
    assert found[0]["jobs"] == -1, "a finished replay is taken as it is"
    assert found[1]["jobs"] > 0
    assert found[1]["seed"] == 1, "one that was cut off is run again"
    assert not list(tmp_path.rglob("*.partial.json"))


def test_stopping_leaves_a_valid_partial_result() -> None:
    looks = iter([False, True])
    body = run_cell(TINY, stop=lambda: next(looks))
    assert not body["complete"]
    assert body["jobs"] == sum(body[n] for n in ("completed", "rejected", "cancelled", "failed", "running", "waiting"))
    assert sum(body["gpu_share"].values()) == pytest.approx(1.0)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed: its refusal cannot be seen")
def test_ray_is_refused_where_it_is_not() -> None:
    with pytest.raises(InputError, match="Ray is not installed"):
        run_cells([TINY], engine="ray", keeper=Keeper(None, False))


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_what_is_found_here(tiny: dict[str, Any], tmp_path: Path) -> None:
    cells = [TINY, replace(TINY, cluster_policy="srtf")]
    here = run_cells(cells, keeper=Keeper(None, False))
    there = run_cells(cells, engine="ray", jobs=2, keeper=Keeper(tmp_path, False))
    assert [unclocked(b) for b in there] == [unclocked(b) for b in here]


def test_a_worker_writes_what_it_has_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "PARTIAL_SECONDS", 0.0)
    path = tmp_path / "x.partial.json"
    whole = in_worker(TINY, Files(partial=path))
    part = json.loads(path.read_text())
    assert whole["complete"]
    assert not part["complete"]
    assert part["jobs"] <= whole["jobs"]


def test_auto_takes_a_cost_model_and_says_why(tiny: dict[str, Any]) -> None:
    found = run_cell(replace(TINY, cost="auto"))
    assert "cost model of A40: auto: no recorded profile of A40" in found["statements"]
    assert found["jct_s"] == tiny["jct_s"]


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["replay", "--trace", "paper:days=0.005", "--cluster", "2x1xA40", "--policies", "hf-peft"]
    arguments += [
        "--cluster-policies",
        "fcfs,srtf:preempt=false",
        "--seeds",
        "2",
        "--until",
        "1",
        "--gpus-per-instance",
        "1",
    ]
    arguments += ["--faults", "gpu_mtbf_h=2,repair_h=0.1", "--costs", "replan_s=1", "--tenants", "2"]
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert len(body["rows"]) == 4
    assert [r["jct_s.mean"]["n"] for r in body["means"]] == [2, 2]
    assert body == json.loads((tmp_path / "replay.json").read_text())
    page = (tmp_path / "replay.html").read_text()
    assert page.count("<svg") == 2
    assert "UNCALIBRATED" in page
    assert "tenant-1" in page
    assert "Partial result" not in page
    assert main([*arguments, "--out", str(tmp_path), "--resume"]) == 0
    assert "± " in capsys.readouterr().out


def test_a_grid_is_its_axes() -> None:
    grid = Path(__file__).parent / "data" / "grid.yaml"
    cells, axes = read_grid(grid)
    assert axes == ["policy", "cluster_policy"]
    assert len(cells) == 2 * 2 * 3
    assert cells[0].costs == (("replan_ns", 3e9),)
    assert {c.seed for c in cells} == {0, 1, 2}


def test_a_sweep_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "{trace: 'paper:days=0.003', cluster: 2x1xA40, policy: hf-peft, gpus_per_instance: 1, until_days: 0.1}"
    )
    seen = []
    for _ in range(2):
        assert main(["sweep", str(grid), "--out", str(tmp_path / "out"), "--json"]) == 0
        seen.append(json.loads(capsys.readouterr().out))
    assert seen[0] == seen[1], "the second run reads the first one's result, clocks included"


def test_sizing_finds_the_least_cluster() -> None:
    """Mean queueing falls with the number of nodes; at 5 of at most 8 it is below the limit."""

    def run(cell: Cell) -> dict[str, Any]:
        nodes = int(cell.clusters[0].split("x")[0])
        mean = {"mean": 100.0 / nodes, "p50": None, "p95": None, "p99": None}
        return {"gpus": nodes, "cluster": cell.clusters[0], "queue_s": mean, "running": 0, "waiting": 0, "failed": 0}

    cell = replace(TINY, clusters=("8x1xA40",))
    body, tried = smallest(cell, parse_goal("mean_queue<21s"), run)
    assert body["cluster"] == "5x1xA40"
    assert [(t["nodes"], t["met"]) for t in tried if t["nodes"] in (4, 5)] == [(4, False), (5, True)]
    with pytest.raises(NoAnswerError, match=r"mean_queue<1s is not reached on the whole 8x1xA40: mean_queue is 12\.5"):
        smallest(cell, parse_goal("mean_queue<1s"), run)


def test_interval_of_known_values() -> None:
    """1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.303, half width 4.303/√3."""
    assert interval([1.0, 2.0, 3.0]) == {"n": 3, "mean": 2.0, "half_width": pytest.approx(4.303 / 3**0.5, rel=1e-3)}
    assert interval([5.0])["half_width"] is None


def test_lost_work_is_redone_and_counted() -> None:
    """Iterations of 1 s, a checkpoint every 10: a failure at 25.5 s loses five steps and half a second of the sixth."""
    fault = Fault(at_ns=51 * S // 2, lasts_ns=10 * S, devices=(0,))
    costs = replace(FREE, checkpoint_ns=10 * S)
    replay = replayed(trace_of([job(0, 0, 40)]), pricer=by_count(S), faults=[fault], costs=costs)
    assert replay.tally.lost_steps == 5
    assert replay.fleet.books.gpu_ns["lost"] == 11 * S // 2
    assert replay.fleet.books.gpu_ns["busy"] == 40 * S
    # down until 35.5 s, then the 20 steps that are left
    assert list(replay.tally.jct_ns) == [pytest.approx(55.5 * S, rel=1e-9)]


def test_a_straggler_slows_its_instance_only() -> None:
    """From 10 s on device 0 is twice as slow for 20 s: ten iterations instead of twenty."""
    slow = Fault(at_ns=10 * S, lasts_ns=20 * S, devices=(0,), slowdown=2.0)
    jobs = [job(0, 0, 40), job(1, 0, 40)]
    replay = replayed(trace_of(jobs), pricer=by_count(S), cluster="2xA40", faults=[slow])
    assert [round(t / S) for t in replay.tally.jct_ns] == [40, 50]


def test_another_backbone_gets_idle_devices() -> None:
    jobs = [job(0, 0, 10), job(1, S, 10, model="llama2-7b")]
    replay = replayed(trace_of(jobs), pricer=by_count(S))
    assert replay.starts == 2
    first_ns, second_ns = replay.tally.queue_ns
    assert first_ns < S < 9 * S <= second_ns


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cluster-policy", "best"), ["unknown cluster policy 'best'", "srtf"]),
        (("--policy", "best"), ["unknown policy 'best'"]),
        (("--costs", "replan=1"), ["--costs", "'replan=1'", "replan_s"]),
        (("--costs", "replan_s=-1"), ["--costs", "must not be negative"]),
        (("--faults", "gone.csv"), ["gone.csv", "file not found"]),
        (("--faults", "gpu_mtbf_h=often"), ["expected a number"]),
        (("--size-for", "fast"), ["--size-for 'fast'", "p95_jct<2h"]),
        (("--size-for", "p95_jct>2h"), ["known goals"]),
        (("--gpus-per-instance", "64"), ["--gpus-per-instance 64", "2 devices"]),
        (("--resume",), ["--resume without --out"]),
    ],
)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...], told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["replay", "--trace", "paper:days=0.01", "--cluster", "2x1xA40", "--policy", "hf-peft"]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in told), error


def test_wrong_grids_name_the_key(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    for text, told in (
        ("{trace: paper}", "trace, cluster"),
        ("{trace: paper, cluster: 1xA40, polcy: x}", "unknown key in .* 'polcy'"),
        ("{trace: paper, cluster: 1xA40, policy: []}", "policy: the list is empty"),
        ("{trace: paper, cluster: 1xA40, seeds: 0}", "seeds=0"),
        ("{trace: paper, cluster: 1xA40, tasks_per_instance: many}", "tasks_per_instance='many': expected int"),
    ):
        grid.write_text(text)
        with pytest.raises(InputError, match=told):
            read_grid(grid)


def test_a_failure_trace_names_its_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "faults.csv"
    path.write_text("at_s,lasts_s,devices,slowdown\n5,60,0-2 7,\n1,2,3,1.5\n")
    first, second = read_faults(path)
    assert (first.at_ns, first.slowdown, second.devices) == (S, 1.5, (0, 1, 2, 7))
    path.write_text("at_s,lasts_s,devices\n5,soon,0\n")
    with pytest.raises(InputError, match=r"faults\.csv: line 2: could not convert string to float: 'soon'"):
        read_faults(path)


def test_options_are_read_as_they_are_written() -> None:
    assert parse_costs("replan_s=0.5,load_bytes_per_s=2e9") == (("replan_ns", 5e8), ("load_bytes_per_s", 2e9))
    assert parse_faults("gpu_mtbf_h=100") == ((("gpu_mtbf_h", 100.0),), None)
    assert parse_faults("faults.csv") == ((), "faults.csv")
    assert TraceHeader(name="x", source="y").statements()[0] == "no column is invented"


def test_an_instance_grows_while_nobody_waits_and_gives_back() -> None:
    """Twice the devices, half the time: 20 steps in 10 s. A second job takes devices back, for good: its neighbour's end is no
    change of its own instance, so that it is not asked to grow."""

    def price(types: Any, shape: Any) -> Any:
        return estimate_of(S // shape.layout.dp, sum(t.step_tokens for t in types))

    alone = replayed(trace_of([job(0, 0, 20)]), "fcfs:grow=true", price, cluster="2xA40")
    assert list(alone.tally.jct_ns) == [pytest.approx(10 * S, rel=1e-6)]
    assert alone.resizes == 1
    both = replayed(trace_of([job(0, 0, 20), job(1, 5 * S, 20)]), "fcfs:grow=true", price, cluster="2xA40")
    assert [round(t / S, 3) for t in both.tally.jct_ns] == [15.0, 20.0], (
        "ten steps by 5 s, ten more by 15 s; twenty by 25 s"
    )
    assert both.resizes == 2


def test_merged_types_are_planned_as_one_and_the_error_is_sampled() -> None:
    """Times by tokens alone: 64 x 32, 128 x 16 and 256 x 8 are one class, whose time is off by the longest length only."""

    def by_tokens(types: Any, shape: Any) -> Any:
        tokens = sum(t.step_tokens for t in types)
        return estimate_of(tokens * 1000 + max(t.billed_len_tokens for t in types), tokens)

    shelf = Shelf(by_tokens)
    kinds = [
        task_type(job(0, 0, 1, global_batch_samples=n, billed_len_tokens=m)) for n, m in ((32, 64), (16, 128), (8, 256))
    ]
    prices = Prices(shelf, shelf, merge=lambda kind: kinds[1])
    numbers = [prices.kind(k) for k in kinds]
    model = model_preset("gpt2")
    shape = prices.shape(
        InstanceShape(model="gpt2", slice=parse_cluster("1xA40"), layout=even_layout(model), microbatches=1)
    )
    found = [prices.ask(tuple(sorted((a, b))), shape) for a in numbers for b in numbers]
    assert len(set(map(id, found))) == 1
    assert prices.made == 1
    assert prices.alone_ns(numbers[2], shape) == 2048 * 1000 + 256
    assert all(abs(e) < 1e-4 for e in prices.errors)


MIXES = ((0,), (0, 1), (0, 0, 1, 2), (0, 1, 2, 2, 1, 0))


def _priced(policy: str = "muxtune:charge=exact") -> tuple[Bench, list[TaskType], InstanceShape]:
    bench = Bench(replace(TINY, policy=policy, incremental=True))
    kinds = list(dict.fromkeys(task_type(j) for j in bench.trace))
    model = model_preset(kinds[0].model)
    chosen = bench.choice(model)
    shape = InstanceShape(
        model=model.name, slice=bench.slice(model), layout=chosen.layout, microbatches=chosen.microbatches
    )
    return bench, kinds, shape


def test_incremental_prices_are_near_those_of_plans_and_independent_of_what_was_asked_before() -> None:
    bench, kinds, shape = _priced()
    again = _priced()[0]
    assert bench.quick is not None
    assert again.quick is not None
    found = {}
    for mix in MIXES:
        types = [kinds[k % len(kinds)] for k in mix]
        found[mix] = bench.quick(types, shape)
        exact = bench.pricer(types, shape)
        assert found[mix].iteration_ns == pytest.approx(exact.iteration_ns, rel=0.03)
        assert found[mix].billed_tokens == exact.billed_tokens
    for mix in reversed(MIXES):
        assert again.quick([kinds[k % len(kinds)] for k in mix], shape) == found[mix]


def test_an_incremental_replay_says_so_and_samples_its_error() -> None:
    prices = run_cell(replace(TINY, policy="muxtune", incremental=True))["prices"]
    assert prices["incremental"]
    assert prices["incremental_sampled"] <= prices["planned"]
    assert not prices["merged"]


def test_incremental_prices_need_the_partition_of_muxtune() -> None:
    for cell in (replace(TINY, incremental=True, policy="sl-peft"), replace(TINY, incremental=True, merge_types=True)):
        with pytest.raises(InputError, match="--incremental"):
            run_cell(cell)
