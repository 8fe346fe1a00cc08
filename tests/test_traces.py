"""Job traces: the generator, what is invented, order on disk, parts, descriptions, and `muxtune trace`."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.experiments.main import main
from muxtune.sim.traces import order
from muxtune.sim.traces.describe import describe
from muxtune.sim.traces.formats import philly
from muxtune.sim.traces.formats.base import TraceOptions
from muxtune.sim.traces.formats.muxtune import Muxtune, write_trace
from muxtune.sim.traces.formats.philly import Philly
from muxtune.sim.traces.formats.philly_csv import PhillyCsv
from muxtune.sim.traces.generate import NS_PER_DAY, Arrivals
from muxtune.sim.traces.mapping import NS_PER_MINUTE, Filler, Mapping, lognormal_ns
from muxtune.sim.traces.order import by_submission
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row, Tally
from muxtune.sim.traces.trace import generate, open_trace, take
from muxtune.spec.errors import InputError
from muxtune.spec.files import json_schema
from muxtune.spec.jobs import Job, TraceHeader

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_json(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def ns(value: int | None) -> int:
    assert value is not None
    return value


# The generator.


def test_the_paper_s_week() -> None:
    """2.59 arrivals a minute are 26,107 a week (σ = 162); durations have mean 372.6 and standard deviation 612.9 minutes."""
    found = describe(generate(Arrivals(), TraceOptions()))
    assert found.jobs == pytest.approx(2.59 * 7 * 24 * 60, abs=4 * 162)
    assert found.duration_s is not None
    assert found.duration_s.mean / 60 == pytest.approx(372.6, rel=0.04)
    assert found.duration_s.std / 60 == pytest.approx(612.9, rel=0.15)
    assert found.classes == 9


def test_the_lognormal_has_the_paper_s_moments() -> None:
    """Mean and variance of the quantile function, integrated by the midpoint rule."""
    points = 20_000
    minutes = [lognormal_ns(372.6, 612.9, (i + 0.5) / points) / NS_PER_MINUTE for i in range(points)]
    mean = sum(minutes) / points
    assert mean == pytest.approx(372.6, rel=0.01)
    assert math.sqrt(sum((m - mean) ** 2 for m in minutes) / points) == pytest.approx(612.9, rel=0.06)
    assert lognormal_ns(10.0, 0.0, 0.3) == 10 * NS_PER_MINUTE
    assert lognormal_ns(372.6, 612.9, 0.5) / NS_PER_MINUTE == pytest.approx(372.6 / math.sqrt(1 + (612.9 / 372.6) ** 2))


def test_limits_of_the_generator() -> None:
    by_count = list(generate(Arrivals(days=None, jobs=50), TraceOptions(seed=3)))
    assert len(by_count) == 50
    one_day = list(generate(Arrivals(days=1.0), TraceOptions(seed=3)))
    assert one_day[:50] == by_count
    assert 0 < one_day[-1].arrival_ns < NS_PER_DAY
    assert list(open_trace("paper:days=1,jobs=50", TraceOptions(seed=3))) == by_count
    assert list(generate(Arrivals(days=None, jobs=50), TraceOptions(seed=4))) != by_count


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("paper:days=0", "days=0.0: must be above 0"),
        ("paper:days=none", "give days, jobs or both"),
        ("paper:jobs=0", "jobs=0: must be from 1"),
        ("paper:rate_per_minute=0", "rate=0.0: must be from 1e-6"),
        ("paper:rate_per_minute=nan", "rate=nan"),
        ("paper:rate=3", "unknown option of trace paper 'rate': known are days, jobs, rate_per_minute"),
    ],
)
def test_wrong_generated_traces(reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_trace(reference)


# What is invented.


def test_every_choice_is_made_and_depends_on_its_own_job_only() -> None:
    mapping = Mapping(
        models=("tiny-llama", "gpt2"), ranks=(4, 8), datasets=("sst2", "qmsum_full"), batches=(2, 4), tenants=3
    )
    filler = Filler(mapping, 0, frozenset())
    records = [Record(job_id=f"j{i}", submit_ns=i) for i in range(300)]
    jobs = [filler.job(r, 0) for r in records]
    assert [filler.job(r, 0) for r in reversed(records)] == jobs[::-1]
    seen = {(j.model, j.peft.rank, j.dataset, j.global_batch_samples, j.tenant) for j in jobs}  # type: ignore[attr-defined]
    assert len(seen) == 2 * 2 * 2 * 2 * 3
    billed = {(j.model, j.dataset): j.billed_len_tokens for j in jobs}
    assert billed["tiny-llama", "sst2"] == billed["gpt2", "sst2"] == 64
    assert billed["gpt2", "qmsum_full"] == 1024  # at most the model's positions
    assert filler.invented == (
        *("model", "peft", "dataset", "billed_len_tokens", "global_batch_samples"),
        *("tenant", "duration_ns"),
    )


def test_deadlines_and_cancellations_are_invented_on_demand() -> None:
    mapping = Mapping(deadline_slack=2.0, cancel_share=0.25)
    jobs = list(generate(Arrivals(days=None, jobs=2000), TraceOptions(mapping=mapping)))
    assert all(j.deadline_ns == j.arrival_ns + 2 * ns(j.duration_ns) for j in jobs)
    cancelled = [j for j in jobs if j.cancel_ns is not None]
    assert len(cancelled) == pytest.approx(500, abs=80)
    assert all(j.arrival_ns <= ns(j.cancel_ns) <= j.arrival_ns + ns(j.duration_ns) for j in cancelled)
    about = generate(Arrivals(), TraceOptions(mapping=mapping)).about
    assert about.invented[-2:] == ("deadline_ns", "cancel_ns")
    assert "25% of the jobs are cancelled" in about.mapping


def test_what_the_source_has_is_not_invented(tmp_path: Path) -> None:
    path = tmp_path / "philly.csv"
    path.write_text(PhillyCsv.EXAMPLE)
    trace = open_trace(str(path), TraceOptions(mapping=Mapping(tenants=5)))
    assert "tenant" not in trace.about.invented
    assert [(j.job_id, j.tenant, j.arrival_ns, j.duration_ns, j.gpus_milli) for j in trace] == [
        ("philly-1", "red", 0, 120_500_000_000, 8000),
        ("philly-0", "blue", 30_000_000_000, 60_000_000_000, 1000),
        ("philly-2", "red", 30_000_000_000, 10_000_000_000, 2000),
    ]


def test_a_file_without_a_suffix_has_a_name(tmp_path: Path) -> None:
    """Philly's log is published as `cluster_job_log`."""
    Philly().write_example(tmp_path / "cluster_job_log")
    trace = open_trace(str(tmp_path / "cluster_job_log"))
    assert trace.about.name == "cluster_job_log"
    assert [(j.job_id, j.arrival_ns, j.duration_ns, j.gpus_milli, j.tenant) for j in trace] == [
        ("application_2", 0, 10**9, 1000, "red"),
        ("application_1", 30 * 10**9, 90 * 10**9, 3000, "blue"),
        ("application_4", 300 * 10**9, 3600 * 10**9, 1000, "red"),
    ]


def test_a_log_larger_than_a_piece_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces, the jobs and the lines of mistakes are the same."""
    path = tmp_path / "log.json"
    Philly().write_example(path)
    whole = list(open_trace(str(path)))
    Philly().write_example(tmp_path / "spoilt.json", spoilt=True)
    for characters in (1, 7, 100):
        monkeypatch.setattr(philly, "CHUNK_CHARACTERS", characters)
        assert list(open_trace(str(path), format_key="philly")) == whole
        with pytest.raises(InputError, match="line 3: column submitted_time"):
            list(open_trace(str(tmp_path / "spoilt.json"), format_key="philly"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-02 00:00:00", 86_400),
        ("1970-01-02T00:00:00.5", 86_400.5),
        ("1970-01-02 00:00:00.0000001", 86_400.0000001),
        ("1970-01-02 08:00:00+08:00", 86_400),
        ("1970-01-01 20:00:00.250000-0400", 86_400.25),
        ("1970-01-02 00:00:00Z", 86_400),
        ("", None),
        ("nan", None),
    ],
)
def test_moments_of_sources(text: str, seconds: float | None) -> None:
    found = Row("f: line 2", 1, {"at": text}).instant_ns("at")
    assert found == (None if seconds is None else round(seconds * 10**9))


@pytest.mark.parametrize(
    "text", ["1970-13-01 00:00:00", "1969-12-31 23:59:59", "2300-01-01 00:00:00", "12:00", "1970-01-02"]
)
def test_wrong_moments_of_sources(text: str) -> None:
    with pytest.raises(InputError, match=f"f: line 2: column at = '{text}': give a date and time from 1970"):
        Row("f: line 2", 1, {"at": text}).instant_ns("at")


# Order, parts, memory.


@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 9))
def test_runs_on_disk_give_the_stable_order(times: list[int], run: int) -> None:
    records = [Record(job_id=str(i), submit_ns=t, duration_ns=i or None) for i, t in enumerate(times)]
    assert list(by_submission(records, run_records=run)) == sorted(records, key=lambda r: r.submit_ns)


def test_a_part_starts_at_its_own_zero() -> None:
    mapping = Mapping(deadline_slack=1.0)
    whole = generate(Arrivals(days=1.0), TraceOptions(mapping=mapping))
    jobs = list(whole)
    part = take(whole, start_ns=NS_PER_DAY // 2, span_ns=NS_PER_DAY // 4)
    wanted = [j for j in jobs if NS_PER_DAY // 2 <= j.arrival_ns < 3 * NS_PER_DAY // 4]
    assert [j.job_id for j in part] == [j.job_id for j in wanted]
    for job, was in zip(part, wanted, strict=True):
        assert was.arrival_ns - job.arrival_ns == ns(was.deadline_ns) - ns(job.deadline_ns) == NS_PER_DAY // 2
    assert "the part" in part.about.source
    assert list(take(whole, jobs=3)) == jobs[:3]
    assert take(whole) is whole


def test_a_long_trace_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of Python's memory over three times as many jobs in no order grows by the ids (about 100 bytes a job) only."""
    monkeypatch.setattr(order, "BLOCK_RECORDS", 20)
    peaks = []
    for count in (3_000, 9_000):
        path = tmp_path / f"{count}.csv"
        clock = random.Random(0)
        lines = (f"2020-01-{clock.randrange(1, 29):02} 00:00:00,60,1,60,blue\n" for _ in range(count))
        path.write_text("timestamp,duration,num_gpus,gpu_time,cluster\n" + "".join(lines))
        reader = PhillyCsv()
        tracemalloc.start()
        records = by_submission(reader.records(path, Tally()), run_records=500)
        assert sum(1 for _ in records) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 6_000 * 200


# The command line.


def test_generate_twice_gives_the_same_bytes(folder, capsys) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl.gz"):
        body = run_json(capsys, "trace", "generate", "--jobs", "40", "--rate", "10", "--seed", "5", "--out", name)
        assert body["jobs"] == 40
        assert "arrival_ns" in body["invented"]
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()
    assert (folder / "c.jsonl.gz").read_bytes() == (folder / "d.jsonl.gz").read_bytes()
    assert list(open_trace("c.jsonl.gz")) == list(open_trace("a.jsonl"))


def test_convert_says_what_it_invented_and_left_out(folder, capsys) -> None:
    (folder / "log.csv").write_text(PhillyCsv.SPOILT[0] + "2020-01-01 00:02:00,,1,0,blue\n")
    assert main(["trace", "convert", "log.csv", "--out", "t.jsonl"]) == 2
    assert "log.csv: line 5: column duration = 'soon': give seconds" in capsys.readouterr().err
    assert not list(folder.glob("t.jsonl*"))
    arguments = ("--skip-bad", "--ranks", "4,8", "--models", "tiny-llama", "--gpus", "scale", "--seed", "2")
    body = run_json(capsys, "trace", "convert", "log.csv", "--out", "t.jsonl", *arguments)
    assert (body["jobs"], body["bad_rows"], body["left_out"]) == (3, 1, {"has no duration": 1})
    assert body["first_bad_row"].startswith("log.csv: line 5")
    assert any("hf-peft" in text for text in body["statements"])
    about = open_trace("t.jsonl").about
    assert (about.seed, about.gpu_rule, "rank one of 4, 8" in about.mapping) == (2, "scale", True)
    assert main(["trace", "convert", "t.jsonl", "--out", "u.jsonl"]) == 0
    assert (folder / "u.jsonl").read_bytes() == (folder / "t.jsonl").read_bytes()


def test_describe_counts_and_draws(folder, capsys) -> None:
    (folder / "t.jsonl").write_text(Muxtune.EXAMPLE)
    body = run_json(capsys, "trace", "describe", "t.jsonl", "--out", "out")
    assert (body["jobs"], body["tenants"], body["classes"], body["with_deadline"], body["with_cancel"]) == (
        3,
        2,
        3,
        1,
        1,
    )
    assert body["duration_s"]["mean"] == 60
    assert dict(body["steps"]["percentiles"])["p50"] == 7
    assert body["gpu_hours"] == pytest.approx(0.5 / 60)
    assert sum(body["arrivals"]) == 3
    saved = json.loads((folder / "out" / "describe.json").read_text())
    assert saved == {k: v for k, v in body.items() if k != "files"}
    picture = (folder / "out" / "trace.svg").read_bytes()
    assert picture.startswith(b"<svg")
    assert main(["trace", "describe", "t.jsonl", "--out", "out"]) == 0
    assert (folder / "out" / "trace.svg").read_bytes() == picture
    shown = capsys.readouterr().out
    assert "3 jobs" in shown
    assert "no column is invented" in shown
    assert "arrivals over time: ▄" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "none.csv", "--out", "t.jsonl"], "none.csv: file not found"),
        (["convert", ".", "--out", "t.jsonl"], ".: is a directory"),
        (["describe", "log.csv", "--format", "slurm"], "unknown trace format 'slurm': known are acme"),
        (["describe", "log.csv", "--ranks", "4,x"], "--ranks 4,x: expected whole numbers"),
        (["describe", "log.csv", "--ranks", "0"], "ranks=0: must be at least 1"),
        (["describe", "log.csv", "--models", "gpt9"], "unknown model 'gpt9'"),
        (["describe", "log.csv", "--datasets", "wiki"], "unknown dataset 'wiki'"),
        (["describe", "log.csv", "--mean", "-3"], "mean_minutes=-3.0"),
        (["describe", "log.csv", "--mean", "inf"], "mean_minutes=inf"),
        (["describe", "log.csv", "--cancel-share", "1.5"], "cancel_share=1.5: must be from 0 to 1"),
        (["describe", "log.csv", "--deadline-slack", "0"], "deadline_slack=0.0: must be above 0"),
        (["describe", "log.csv", "--tenants", "many"], "--tenants many: expected whole numbers"),
        (["describe", "log.csv", "--gpus", "half"], "--gpus half: expected one of ignore, scale"),
        (["describe", "log.csv", "--days", "0"], "--days 0: expected days above 0"),
        (["describe", "log.csv", "--start-day", "9"], "log.csv: no job is left to describe"),
        (["convert", "log.csv", "--start-day", "9", "--out", "t.jsonl"], "0 jobs are left to write"),
        (["generate", "--jobs", "0", "--out", "t.jsonl"], "jobs=0: must be from 1"),
        (["generate", "--days", "1e9", "--out", "t.jsonl"], "days=1000000000.0: must be above 0, at most 36500"),
        (["generate", "--out", "."], "is a directory"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, folder, capsys) -> None:
    (folder / "log.csv").write_text(PhillyCsv.EXAMPLE)
    assert main(["trace", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(folder.glob("t.jsonl*"))


def test_the_schema_in_the_docs_is_the_nouns_(capsys) -> None:
    """`muxtune trace schema > docs/trace-format.schema.json` writes it anew; PEFT methods may have come since."""
    assert main(["trace", "schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"header": json_schema(TraceHeader), "job": json_schema(Job)}
    written = json.loads((ROOT / "docs" / "trace-format.schema.json").read_text(encoding="utf-8"))
    for schema in (printed["job"], written["job"]):
        del schema["$defs"], schema["properties"]["peft"]
    assert printed == written


def test_the_example_in_the_docs_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "trace-format.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    {")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    trace = open_trace(str(tmp_path / "t.jsonl"))
    jobs = list(trace)
    assert [job.job_id for job in jobs] == ["a", "b"]
    assert trace.lengths(jobs[1].dataset).samples == 3
    assert write_trace(trace, tmp_path / "u.jsonl") == 2
    assert list(open_trace(str(tmp_path / "u.jsonl"))) == jobs
