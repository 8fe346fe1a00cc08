"""Laws of every trace format, of every data set table and length reader, and of every preset."""

from __future__ import annotations

import dataclasses
import gzip
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muxtune.sim.traces.formats.base import TraceOptions, find_format, trace_formats
from muxtune.sim.traces.formats.muxtune import Muxtune, write_trace
from muxtune.sim.traces.mapping import Mapping
from muxtune.sim.traces.rows import Tally
from muxtune.sim.traces.trace import open_trace
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.jobs import WORK_RULE, Trace
from muxtune.spec.noun import canonical_bytes

KEYS = sorted(trace_formats())
FOREIGN = [key for key in KEYS if key != "muxtune"]
PLACES = [parent / "shared" / "data" / "traces" for parent in Path(__file__).parents]
DATA = next((place for place in PLACES if place.is_dir()), PLACES[3])


def example(key: str, folder: Path, spoilt: bool = False) -> Path:
    made = trace_formats()[key]()
    path = folder / f"jobs{made.SUFFIX}"
    made.write_example(path, spoilt)
    return path


def trace_bytes(trace: Trace) -> bytes:
    return canonical_bytes([trace.about, *trace])


def test_the_known_formats() -> None:
    wanted = {"acme", "alibaba-openb", "alibaba-pai", "azure-llm", "muxtune", "parquet", "philly", "philly-csv"}
    assert wanted <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_file_looks_like_its_own_format_only(key: str, tmp_path: Path) -> None:
    path = example(key, tmp_path)
    assert find_format(path)[0] == key
    assert [name for name, made in trace_formats().items() if made().matches(path)] == [key]


@pytest.mark.parametrize("key", KEYS)
def test_jobs_are_sorted_unique_and_whole(key: str, tmp_path: Path) -> None:
    trace = open_trace(str(example(key, tmp_path)))
    jobs = list(trace)
    assert len(jobs) >= 3
    arrivals = [job.arrival_ns for job in jobs]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0
    assert len({job.job_id for job in jobs}) == len(jobs)
    for job in jobs:
        assert (job.steps is None) != (job.duration_ns is None)
        assert min(job.duration_ns or 0, job.gpus_milli or 0, job.arrival_ns) >= 0
        assert trace.lengths(job.dataset).samples >= 1


@pytest.mark.parametrize("key", KEYS)
def test_reading_twice_gives_the_same_bytes(key: str, tmp_path: Path) -> None:
    path = str(example(key, tmp_path))
    trace = open_trace(path)
    assert trace_bytes(trace) == trace_bytes(trace) == trace_bytes(open_trace(path))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
@pytest.mark.parametrize("key", KEYS)
def test_a_trace_comes_back_from_our_format(key: str, name: str, tmp_path: Path) -> None:
    trace = open_trace(str(example(key, tmp_path)))
    written = [tmp_path / name, tmp_path / f"again-{name}"]
    assert write_trace(trace, written[0]) == len(list(trace))
    back = open_trace(str(written[0]))
    assert (back.about, list(back)) == (trace.about, list(trace))
    write_trace(back, written[1])
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize("key", KEYS)
def test_a_bad_row_is_named_and_can_be_skipped(key: str, tmp_path: Path) -> None:
    _, place, column = trace_formats()[key].SPOILT
    path = example(key, tmp_path, spoilt=True)
    with pytest.raises(InputError) as caught:
        list(open_trace(str(path)))
    text = str(caught.value)
    assert text.startswith(f"{path}: {place}")
    assert column in text
    assert "\n" not in text
    tally = Tally(skip_bad=True)
    left = list(open_trace(str(path), tally=tally))
    assert (tally.bad, tally.first_bad) == (1, text)
    assert all(job.job_id for job in left)


@pytest.mark.parametrize("key", FOREIGN)
def test_a_result_states_what_is_invented_and_the_work_rule(key: str, tmp_path: Path) -> None:
    path = str(example(key, tmp_path))
    trace = open_trace(path, TraceOptions(seed=7, gpu_rule="scale"))
    assert {"model", "peft", "dataset", "billed_len_tokens", "global_batch_samples"} <= set(trace.about.invented)
    said = trace.about.statements()
    assert said[0].startswith("invented columns (seed 7): model, peft")
    assert WORK_RULE in said
    assert "GPU count" in said[-1]
    assert trace_formats()[key].NOTE in trace.about.source  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", FOREIGN)
def test_the_seed_changes_what_is_invented_and_nothing_else(key: str, tmp_path: Path) -> None:
    path = str(example(key, tmp_path))
    mapping = Mapping(ranks=tuple(range(1, 1000)))
    traces = [open_trace(path, TraceOptions(mapping=mapping, seed=seed)) for seed in (0, 1)]
    invented = traces[0].about.invented
    assert list(traces[0]) != list(traces[1])
    for one, other in zip(*traces, strict=True):
        for field in dataclasses.fields(one):
            if field.name not in invented:
                assert getattr(one, field.name) == getattr(other, field.name)


@pytest.mark.parametrize("key", [k for k in KEYS if k != "parquet"])
def test_gzipped_text_is_read_as_it_is(key: str, tmp_path: Path) -> None:
    path = example(key, tmp_path)
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert find_format(packed)[0] == key
    assert list(open_trace(str(packed))) == list(open_trace(str(path)))


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000), junk=st.binary(max_size=8))
def test_no_damage_gives_a_traceback(key: str, cut: int, junk: bytes, tmp_path: Path) -> None:
    """A file cut short, with junk in it, is read or refused with one sentence that names it."""
    path = example(key, tmp_path)
    whole = path.read_bytes()
    place = cut % len(whole)
    path.write_bytes(whole[:place] + junk + whole[place + len(junk) :][: cut % 97])
    refused = ""
    try:
        list(open_trace(str(path), format_key=key))
    except InputError as error:
        refused = str(error)
    assert refused == "" or str(path) in refused or refused.startswith("job ")
    assert "\n" not in refused.strip()


@pytest.mark.parametrize("key", KEYS)
def test_no_file_a_directory_and_an_empty_file_are_named(key: str, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=r"file not found|is a directory"):
            list(open_trace(str(path), format_key=key))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        list(open_trace(str(tmp_path / "empty"), format_key=key))


def test_unknown_formats_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownKeyError, match=r"unknown trace format 'slurm': known are acme, .*philly-csv"):
        open_trace(str(example("muxtune", tmp_path)), format_key="slurm")
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(InputError, match=r"like no known trace format: name one with --format, of acme"):
        open_trace(str(tmp_path / "notes.txt"))


def test_our_own_format_has_nothing_to_invent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks nothing"):
        open_trace(str(example("muxtune", tmp_path)), TraceOptions(mapping=Mapping()))


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (2, ('"arrival_ns": 5', '"arrival_ns": 5, "arrival_ns": 6'), "line 3: key 'arrival_ns' occurs twice"),
        (2, ('"job_id": "b"', '"job_id": "a"'), "line 3: job_id = 'a': occurs twice"),
        (3, ('"arrival_ns": 5', '"arrival_ns": 4'), "line 4: arrival_ns = 4: the job before arrives at 5: sort"),
        (2, ('"dataset": "rte"', '"dataset": "wiki"'), "line 3: dataset: unknown dataset 'wiki': known are"),
        (2, ('"model": "tiny-llama"', '"model": "gpt9"'), "line 3: model: unknown model 'gpt9'"),
        (2, ('"kind": "lora"', '"kind": "prompt"'), "line 3: peft"),
        (2, ('"rank": 4', '"rank": 0'), "rank=0: must be at least 1"),
        (2, ('"billed_len_tokens": 256', '"billed_len_tokens": 5000000'), "line 3: billed_len_tokens = 5000000: exceeds"),
        (2, ('"deadline_ns"', '"deadlin_ns"'), "line 3: deadlin_ns = 90000000000: unknown key"),
        (2, ("{", "["), "line 3: is not JSON"),
        (0, ('"source"', '"sauce"'), "line 1: "),
        (0, ('"muxtune_trace": 1', '"muxtune_trace": 2'), "line 1: muxtune_trace = 2"),
    ],
)  # fmt: skip
def test_mistakes_in_our_own_format(line: int, change: tuple[str, str], message: str, tmp_path: Path) -> None:
    lines = Muxtune.EXAMPLE.splitlines()
    lines[line] = lines[line].replace(*change, 1)
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        list(open_trace(str(tmp_path / "t.jsonl"), format_key="muxtune"))
    assert message in str(caught.value)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real traces (shared/data/traces) are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "jobs", "left_out"),
    [
        ("philly_2017", 70_783, {}),
        ("acme_kalos_2023_completed_subset", 319, {}),
        ("alibaba_gentd26_lora_requests", 26_823, {}),
        ("azure_llm_2023_requests", 28_185, {}),
        ("alibaba_openb_2023_pods", 6_203, {"asks for no GPU": 1_088, "has no duration": 861}),
    ],
)
def test_the_real_traces(name: str, jobs: int, left_out: dict[str, int]) -> None:
    tally = Tally()
    found = list(open_trace(str(DATA / f"{name}.parquet"), tally=tally))
    assert (len(found), tally.left_out, tally.bad) == (jobs, left_out, 0)
    assert all(a.arrival_ns <= b.arrival_ns for a, b in pairwise(found))
