"""Files that users write: lengths, workloads, clusters; what is read and how a mistake is named."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest

from muxtune.sim.traces.cluster import read_cluster
from muxtune.sim.traces.lengths import read_lengths
from muxtune.sim.traces.workload import read_workload
from muxtune.spec.cluster import LINKS, device_presets, parse_cluster
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.lengths import embedded_length
from muxtune.spec.model import model_preset
from muxtune.spec.noun import plain
from muxtune.spec.peft.lora import LoRA

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not beside the checkout")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, header: Sequence[str], *rows: Sequence[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def pairs(path: Path, tokenizer: str | None = None) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    found = read_lengths(path, tokenizer)
    return found.tokenizer, found.prompt_tokens, found.response_tokens


# Lengths


def test_csv_and_parquet_of_counts(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"prompt_tokens": [3, 0], "response_tokens": [1, 2], "note": ["a", "b"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for suffix in ("csv", "parquet"):
        assert pairs(tmp_path / f"a.{suffix}") == ("unstated", (3, 0), (1, 2))
        assert pairs(tmp_path / f"a.{suffix}", "gpt2") == ("gpt2", (3, 0), (1, 2))
        assert read_lengths(tmp_path / f"a.{suffix}").name == "a"


def test_a_tokenizers_own_columns_come_first(tmp_path: Path) -> None:
    header = ("prompt_tokens", "response_tokens", "prompt_tokens_llama2", "response_tokens_llama2")
    path = write_csv(tmp_path / "a.csv", header, (3, 1, 5, 2))
    assert pairs(path) == ("unstated", (3,), (1,))
    assert pairs(path, "llama2") == ("llama2", (5,), (2,))
    only = write_csv(tmp_path / "b.csv", header[2:], (5, 2))
    assert pairs(only, "llama2") == ("llama2", (5,), (2,))
    with pytest.raises(InputError, match=r"column prompt_tokens is missing; name its tokenizer, one of llama2"):
        read_lengths(only)


def test_jsonl_of_counts_and_of_texts(tmp_path: Path) -> None:
    counts = write(
        tmp_path / "c.jsonl",
        '{"prompt_tokens": 3, "response_tokens": 1}\n\n{"prompt_tokens": 0, "response_tokens": 2}\n',
    )
    assert pairs(counts) == ("unstated", (3, 0), (1, 2))
    texts = write(tmp_path / "t.jsonl", json.dumps({"prompt": "für", "response": "ok"}, ensure_ascii=False))
    assert pairs(texts) == ("bytes", (4,), (2,))  # ü is two bytes in UTF-8
    assert pairs(texts, "bytes") == ("bytes", (4,), (2,))
    with pytest.raises(
        InputError, match=r"'gpt2' must be a tokenizer file \(tokenizer.json\), and .*gpt2 does not exist"
    ):
        read_lengths(texts, "gpt2")


def quantile_row(**changed: Any) -> dict[str, Any]:
    return {"samples": 1000, "response_share": 0.25, **{f"p{i}": 10 + i for i in range(101)}, **changed}


def write_quantiles(path: Path, *rows: dict[str, Any]) -> Path:
    return write_csv(path, list(rows[0]), *(list(r.values()) for r in rows))


def test_quantile_table(tmp_path: Path) -> None:
    found = read_lengths(write_quantiles(tmp_path / "q.csv", quantile_row()))
    assert found.quantiles_tokens == tuple(range(10, 111))
    assert (found.samples, found.response_share, found.tokenizer) == (1000, 0.25, "unstated")


def test_quantile_rows_of_several_tokenizers(tmp_path: Path) -> None:
    rows = [quantile_row(tokenizer="gpt2"), quantile_row(tokenizer="llama2", p100=999)]
    path = write_quantiles(tmp_path / "q.csv", *rows)
    assert read_lengths(path, "llama2").quantiles_tokens[-1] == 999
    assert read_lengths(path, "llama2").tokenizer == "llama2"
    with pytest.raises(InputError, match="holds 2 quantile rows for tokenizer any: keep exactly one"):
        read_lengths(path)


COUNTS = ("prompt_tokens", "response_tokens")
WRONG_LENGTHS: list[tuple[str, Callable[[Path], Path], str]] = [
    (
        "missing column",
        lambda d: write_csv(d / "x.csv", ("prompt_tokens",), (1,)),
        "column response_tokens is missing; it has prompt_tokens: add it",
    ),
    (
        "negative",
        lambda d: write_csv(d / "x.csv", COUNTS, (1, 1), (-2, 1)),
        "line 3: prompt_tokens = -2: give a whole number, at least 0",
    ),
    (
        "not whole",
        lambda d: write_csv(d / "x.csv", COUNTS, (1, 1.5)),
        "line 2: response_tokens = '1.5': give a whole number",
    ),
    (
        "empty cell",
        lambda d: write_csv(d / "x.csv", COUNTS, (1, "")),
        "line 2: response_tokens is empty: give a whole number",
    ),
    ("short line", lambda d: write_csv(d / "x.csv", COUNTS, (1,)), "line 2: response_tokens is empty"),
    (
        "both 0",
        lambda d: write_csv(d / "x.csv", COUNTS, (0, 0)),
        "line 2: prompt_tokens and response_tokens are both 0",
    ),
    ("no sample", lambda d: write_csv(d / "x.csv", COUNTS), "x.csv: holds no sample"),
    ("empty file", lambda d: write(d / "x.csv", ""), "column prompt_tokens is missing"),
    ("no file", lambda d: d / "x.csv", "x.csv: file not found"),
    ("suffix", lambda d: write(d / "x.txt", "1"), "x.txt: cannot read .txt: give one of .parquet, .csv, .jsonl"),
    (
        "not UTF-8",
        lambda d: Path(str((d / "x.csv").write_bytes(b"\xff\xfe") and d / "x.csv")),
        "x.csv: cannot be read as csv",
    ),
    ("no parquet", lambda d: write(d / "x.parquet", "PAR?"), "x.parquet: cannot be read as parquet"),
    (
        "not JSON",
        lambda d: write(d / "x.jsonl", '{"prompt": "a", "response": "b"}\n{oops'),
        "line 2 is not JSON: .*: write one object a line",
    ),
    ("no object", lambda d: write(d / "x.jsonl", "[1, 2]"), "line 1 is not a JSON object"),
    ("empty JSONL", lambda d: write(d / "x.jsonl", "\n"), "x.jsonl: holds no sample"),
    (
        "no text",
        lambda d: write(d / "x.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a"}'),
        "line 2: response = None is no text",
    ),
    (
        "empty texts",
        lambda d: write(d / "x.jsonl", '{"prompt": "", "response": ""}'),
        "line 1: prompt and response are both empty",
    ),
    (
        "count as text",
        lambda d: write(d / "x.jsonl", '{"prompt_tokens": true, "response_tokens": 1}'),
        "line 1: prompt_tokens = True: give a whole number",
    ),
    (
        "decreasing",
        lambda d: write_quantiles(d / "x.csv", quantile_row(p7=99)),
        "line 2: x: quantiles_tokens decreases from p7=99 to p8=18",
    ),
    (
        "quantile missing",
        lambda d: write_csv(d / "x.csv", ("p0", "p100"), (1, 2)),
        "column p1 is missing: a quantile table has p0..p100",
    ),
    (
        "share",
        lambda d: write_quantiles(d / "x.csv", quantile_row(response_share="half")),
        "response_share = 'half': give a number in",
    ),
    ("share of 2", lambda d: write_quantiles(d / "x.csv", quantile_row(response_share=2)), "response_share in"),
    (
        "quantile of 0",
        lambda d: write_quantiles(d / "x.csv", quantile_row(p0=0)),
        "line 2: p0 = 0: give a whole number, at least 1",
    ),
]


@pytest.mark.parametrize(("build", "message"), [w[1:] for w in WRONG_LENGTHS], ids=[w[0] for w in WRONG_LENGTHS])
def test_wrong_lengths_are_named_by_file_place_column_and_value(tmp_path: Path, build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        read_lengths(build(tmp_path))
    assert str(refused.value).startswith(str(tmp_path / "x."))
    assert "\n" not in str(refused.value)


def test_a_wrong_parquet_value_is_named_by_its_row(tmp_path: Path) -> None:
    pandas.DataFrame({"prompt_tokens": [1.0, None], "response_tokens": [1, 1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"row 0: prompt_tokens = 1\.0: give a whole number"):
        read_lengths(tmp_path / "x.parquet")
    pandas.DataFrame({"prompt_tokens": [1, -1], "response_tokens": [1, 1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"row 1: prompt_tokens = -1: give a whole number"):
        read_lengths(tmp_path / "x.parquet")


@needs_data
@pytest.mark.parametrize("tokenizer", [None, "llama2"])
def test_real_lengths_agree_with_the_embedded_quantiles(tokenizer: str | None) -> None:
    found = read_lengths(DATA / "lengths" / "rte.parquet", tokenizer)
    table = embedded_length("rte@llama2" if tokenizer else "rte")
    totals = sorted(p + r for p, r in zip(found.prompt_tokens, found.response_tokens, strict=True))
    assert found.samples == table.samples == 2490
    assert (totals[0], totals[-1]) == (table.quantiles_tokens[0], table.quantiles_tokens[-1])
    assert totals[len(totals) // 2] == pytest.approx(table.quantiles_tokens[50], abs=1)


@needs_data
def test_real_texts_are_counted_in_bytes() -> None:
    found = read_lengths(DATA / "text" / "boolq.jsonl")
    first = json.loads((DATA / "text" / "boolq.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert found.tokenizer == "bytes"
    assert (found.prompt_tokens[0], found.response_tokens[0]) == tuple(
        len(first[k].encode()) for k in ("prompt", "response")
    )


# Workloads

TASK = {"task_id": "a", "peft": {"kind": "lora"}, "dataset": "rte", "global_batch_samples": 4}


def workload_file(folder: Path, tasks: Any = None, **more: Any) -> Path:
    content = {"model": "tiny-llama", "tasks": [TASK] if tasks is None else tasks, **more}
    return write(folder / "work.json", json.dumps(content))


def test_a_workload_from_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path / "two.yaml",
        """
model: llama2-7b
tasks:
  - task_id: support
    tenant: acme
    peft: {kind: lora, rank: 16, alpha: 32, targets: [qkv, proj]}
    dataset: rte@llama2
    global_batch_samples: 32
    steps: 10
    arrival_s: 1.5
    deadline_s: 3600
    weight: 2
    learning_rate: 1e-4
  - task_id: code
    peft: {kind: lora}
    dataset: sst2
    billed_len_tokens: 100
    global_batch_samples: 8
""",
    )
    found = read_workload(path)
    support, code = found.tasks
    assert (found.name, found.model) == ("two", model_preset("llama2-7b"))
    assert support.peft == LoRA(rank=16, alpha=32.0, targets=("qkv", "proj"))
    assert (support.tenant, support.steps, support.weight, support.learning_rate) == ("acme", 10, 2.0, 1e-4)
    assert (support.arrival_ns, support.deadline_ns) == (1_500_000_000, 3_600_000_000_000)
    assert support.billed_len_tokens == embedded_length("rte@llama2").covered_length()
    assert (code.billed_len_tokens, code.deadline_ns, code.tenant) == (100, None, "default")
    assert [(d.name, d.tokenizer) for d in found.datasets] == [("rte@llama2", "llama2"), ("sst2", "gpt2")]


def test_a_data_set_file_is_relative_to_the_workload_file(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    header = ("prompt_tokens", "response_tokens", "prompt_tokens_x", "response_tokens_x")
    write_csv(tmp_path / "sets" / "mine.csv", header, (10, 7, 30, 1), (10, 2, 30, 1))
    tasks = [{**TASK, "dataset": "sets/mine.csv"}, {**TASK, "task_id": "b", "dataset": "sets/mine.csv@x"}]
    found = read_workload(workload_file(tmp_path, tasks))
    assert [t.billed_len_tokens for t in found.tasks] == [32, 32]
    assert [found.lengths(t).prompt_tokens for t in found.tasks] == [(10, 10), (30, 30)]


def test_the_default_billed_length_is_capped_at_the_models_positions(tmp_path: Path) -> None:
    long = [{**TASK, "dataset": "qmsum_full"}]
    assert embedded_length("qmsum_full").covered_length() > 512
    assert read_workload(workload_file(tmp_path, long)).tasks[0].billed_len_tokens == 512


def test_a_model_may_be_given_by_its_shapes(tmp_path: Path) -> None:
    shapes = {**plain(model_preset("tiny-llama")), "name": "mine", "layers": 3}
    found = read_workload(workload_file(tmp_path, model=shapes, name="named"))
    assert (found.name, found.model.name, found.model.layers) == ("named", "mine", 3)


WRONG_WORKLOADS: list[tuple[str, dict[str, Any], str]] = [
    ("model", {"model": "llama9"}, "model: unknown model 'llama9': known are .*llama2-7b"),
    ("no model", {"model": None}, "model is missing: name a preset or give its shapes"),
    (
        "model shape",
        {"model": {**plain(model_preset("tiny-llama")), "layers": 0}},
        "model: layers=0: must be at least 1",
    ),
    ("key", {"speed": 1}, "speed = 1: unknown key: remove it"),
    ("task key", {"tasks": [{**TASK, "rank": 4}]}, "tasks.0.rank = 4: unknown key"),
    (
        "no dataset",
        {"tasks": [{k: v for k, v in TASK.items() if k != "dataset"}]},
        "tasks.0.dataset: is missing: add it",
    ),
    (
        "dataset",
        {"tasks": [{**TASK, "dataset": "imdb"}]},
        "tasks.0: unknown dataset 'imdb': known are .*rte.*sst2.*; or give the path of a file",
    ),
    (
        "dataset path",
        {"tasks": [{**TASK, "dataset": "sets/mine.csv"}]},
        "tasks.0: dataset sets/mine.csv: file not found",
    ),
    (
        "dataset path@",
        {"tasks": [{**TASK, "dataset": "mine.parquet@gpt2"}]},
        "dataset mine.parquet@gpt2: file not found: .*mine.parquet does not exist",
    ),
    (
        "batch",
        {"tasks": [{**TASK, "global_batch_samples": -4}]},
        "tasks.0: global_batch_samples=-4: must be at least 1",
    ),
    (
        "batch text",
        {"tasks": [{**TASK, "global_batch_samples": "4"}]},
        'tasks.0.global_batch_samples = "4": Input should be a valid integer',
    ),
    ("arrival", {"tasks": [{**TASK, "arrival_s": -1}]}, "tasks.0.*: arrival_s=-1.*: must not be negative"),
    ("rank", {"tasks": [{**TASK, "peft": {"kind": "lora", "rank": 0}}]}, "tasks.0.peft.*: rank=0: must be at least 1"),
    ("kind", {"tasks": [{**TASK, "peft": {"kind": "magic"}}]}, "tasks.0.peft.*magic"),
    ("density", {"tasks": [{**TASK, "peft": {"kind": "diff-pruning", "density": 2}}]}, "density=2.*: must be above 0"),
    ("act", {"tasks": [{**TASK, "peft": {"kind": "bottleneck", "activation": "tanh"}}]}, "tasks.0.peft.activation"),
    ("no rank", {"tasks": [{**TASK, "peft": {"kind": "ia3", "rank": 4}}]}, "tasks.0.peft.rank"),
    ("places", {"tasks": [{**TASK, "peft": {"kind": "dora", "targets": ["mlp"]}}]}, r"targets=\['mlp'\]: name each of"),
    ("billed 0", {"tasks": [{**TASK, "billed_len_tokens": 0}]}, "tasks.0: billed_len_tokens=0: must be at least 1"),
    (
        "too long",
        {"tasks": [{**TASK, "billed_len_tokens": 4096}]},
        "task a: billed_len_tokens=4096 exceeds the 512 positions of tiny-llama",
    ),
    ("twice", {"tasks": [TASK, TASK]}, "task_id 'a' occurs 2 times"),
    ("none", {"tasks": []}, "tasks is empty"),
]


@pytest.mark.parametrize(("content", "message"), [w[1:] for w in WRONG_WORKLOADS], ids=[w[0] for w in WRONG_WORKLOADS])
def test_wrong_workloads_are_named_by_file_path_and_value(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    path = workload_file(tmp_path, **content)
    with pytest.raises(InputError, match=message) as refused:
        read_workload(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_a_wrong_data_set_file_is_named_itself(tmp_path: Path) -> None:
    write_csv(tmp_path / "bad.csv", COUNTS, (1, -1))
    with pytest.raises(InputError, match=r"bad\.csv: line 2: response_tokens = -1"):
        read_workload(workload_file(tmp_path, [{**TASK, "dataset": "bad.csv"}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n", "expected a mapping with model and tasks"), ("a: 1\na: 2\n", "key 'a' occurs twice")],
)
def test_a_file_that_is_no_workload_at_all(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_workload(write(tmp_path / "w.yaml", text))
    with pytest.raises(InputError, match=r"none\.yaml: file not found"):
        read_workload(tmp_path / "none.yaml")


@needs_data
def test_a_workload_on_real_lengths(tmp_path: Path) -> None:
    real = str(DATA / "lengths" / "rte.parquet")
    tasks = [{**TASK, "dataset": real}, {**TASK, "task_id": "b", "dataset": f"{real}@llama2"}]
    found = read_workload(workload_file(tmp_path, tasks))
    assert [d.samples for d in found.datasets] == [2490, 2490]
    assert sum(found.datasets[1].prompt_tokens) > sum(found.datasets[0].prompt_tokens)


# Clusters


def test_a_cluster_by_name() -> None:
    assert read_cluster("8x2xA40-ib") == parse_cluster("8x2xA40-ib")


def test_a_cluster_file_with_presets(tmp_path: Path) -> None:
    path = write(
        tmp_path / "lab.yaml",
        """
device: A40
nodes:
  - {gpus: 2, link: nvlink}
  - {gpus: 4, link: pcie}
network: ib
""",
    )
    found = read_cluster(str(path))
    assert (found.name, found.size, found.device) == ("lab", 6, device_presets()["A40"])
    assert found.nodes[0] == parse_cluster("2xA40-nvlink").nodes[0]
    assert (found.nodes[1].link, found.network) == (LINKS["pcie"], LINKS["ib"])


def test_a_cluster_file_with_its_own_figures(tmp_path: Path) -> None:
    slow = {"kind": "ib", "bandwidth_bytes_per_s": 1000, "latency_ns": 7}
    device = {**plain(device_presets()["A100"]), "name": "A100-PCIE", "launch_ns": 1}
    content = {"name": "mine", "device": device, "nodes": [{"gpus": 1, "link": slow}]}
    found = read_cluster(str(write(tmp_path / "c.json", json.dumps(content))))
    assert (found.name, found.device.launch_ns, found.nodes[0].link.latency_ns) == ("mine", 1, 7)
    assert found.network == LINKS["ib"]


NODE = {"gpus": 1, "link": "pcie"}


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({"device": "A39", "nodes": [NODE]}, UnknownKeyError, "unknown device in .*c.json 'A39': known are A100"),
        ({"device": "A40", "nodes": [{"gpus": 1, "link": "wifi"}]}, UnknownKeyError, "unknown link in .*'wifi'"),
        ({"device": "A40", "nodes": [NODE], "network": "wifi"}, UnknownKeyError, "unknown network in .*'wifi'"),
        ({"device": "A40", "nodes": []}, InputError, "nodes is empty or missing"),
        ({"device": "A40"}, InputError, "nodes is empty or missing"),
        ({"nodes": [NODE]}, InputError, "c.json: device"),
        (
            {"device": "A40", "nodes": [{"gpus": 0, "link": "pcie"}]},
            InputError,
            r"nodes\.0.*: gpus=0: a node has at least one",
        ),
        ({"device": "A40", "nodes": [{"gpus": 1}]}, InputError, r"nodes\.0\.link: is missing: add it"),
        ({"device": "A40", "nodes": [NODE], "racks": 2}, InputError, "racks = 2: unknown key"),
        ([NODE], InputError, "expected a mapping with device, nodes and network"),
    ],
)
def test_wrong_cluster_files_are_named(tmp_path: Path, content: Any, kind: type[InputError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_cluster(str(write(tmp_path / "c.json", json.dumps(content))))


def test_a_cluster_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: file not found"):
        read_cluster("nowhere.yaml")


# Training


TRAINED = """
model: tiny-test
tasks:
  - task_id: a
    peft: {{kind: lora}}
    dataset: sst2
    global_batch_samples: 1
    steps: 50
    optimizer: sgd
    loss_scale: 512
    loss_scale_growth_steps: 100
    schedule: {schedule}
"""


def test_a_task_says_how_it_is_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "w.yaml", TRAINED.format(schedule="{kind: cosine, warmup_steps: 5, final_share: 0.1}"))
    (task,) = read_workload(path).tasks
    assert (task.optimizer, task.loss_scale, task.loss_scale_growth_steps) == ("sgd", 512.0, 100)
    assert plain(task.schedule) == {"kind": "cosine", "warmup_steps": 5, "final_share": 0.1}


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("{kind: step}", "tasks.0.schedule.kind"),
        ("{kind: cosine, warmup: 5}", "tasks.0.schedule.warmup"),
        ("{kind: linear, warmup_steps: 60}", "warmup_steps=60: must be below steps=50"),
    ],
)
def test_a_wrong_schedule_is_named(tmp_path: Path, schedule: str, words: str) -> None:
    path = write(tmp_path / "w.yaml", TRAINED.format(schedule=schedule))
    with pytest.raises(InputError, match=r"tasks\.0") as found:
        read_workload(path)
    assert words in str(found.value)
