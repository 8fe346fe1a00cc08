"""Laws of every preset: backbones, devices, and clusters of each device."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from muxtune.experiments.main import main
from muxtune.sim.traces.cluster import read_cluster
from muxtune.spec.cluster import (
    LINKS,
    MAX_DEVICES,
    NO_NVLINK,
    Cluster,
    DeviceSpec,
    Link,
    Node,
    device_presets,
    parse_cluster,
)
from muxtune.spec.errors import InputError, UnknownKeyError
from muxtune.spec.files import validate
from muxtune.spec.model import ModelSpec, model_preset, model_presets
from muxtune.spec.noun import plain
from muxtune.spec.peft.lora import LoRA
from muxtune.spec.task import Task

MODELS, DEVICES = sorted(model_presets()), sorted(device_presets())


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = model_preset(name)
    assert model.name == name
    assert validate(ModelSpec, plain(model), name) == model
    assert model.heads % model.kv_heads == 0
    assert model.positions != "rope" or model.head_dim % 2 == 0
    linears = sum(math.prod(model.linear_shape(t)) for t in ("qkv", "proj", "fc1", "fc2"))
    assert model.parameters > model.layers * linears
    assert (
        model.parameters == model.layers * model.layer_parameters + model.embedding_parameters + model.head_parameters
    )
    assert model.linear_shape("fc2")[0] * (2 if model.gated else 1) == model.linear_shape("fc1")[1]


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name: str) -> None:
    device = device_presets()[name]
    assert device.name == name
    assert validate(DeviceSpec, plain(device), name) == device
    assert device.peak_flops("fp32") <= device.peak_flops("bf16") == device.peak_flops("fp16")
    assert 0 <= device.idle_w <= device.peak_w
    # A step of 1 FLOP a byte is bound by memory on all of them.
    assert device.peak_flops_half > device.bandwidth_bytes_per_s or device.is_cpu


@pytest.mark.parametrize("name", DEVICES)
def test_clusters_of_every_device(name: str, tmp_path: Path) -> None:
    cluster = parse_cluster(f"2x2x{name}")
    assert (cluster.size, len(cluster.nodes), cluster.device) == (4, 2, device_presets()[name])
    assert cluster.link(0, 1).bandwidth_bytes_per_s >= 1
    assert cluster.slowest_link((0, 1, 2, 3)).bandwidth_bytes_per_s >= 1
    (tmp_path / "c.json").write_text(json.dumps({"device": name, "nodes": [{"gpus": 2, "link": "pcie"}]}))
    assert read_cluster(str(tmp_path / "c.json")).device == cluster.device


@pytest.mark.parametrize("link", sorted(LINKS))
@pytest.mark.parametrize("name", DEVICES)
def test_a_link_is_used_or_refused(name: str, link: str) -> None:
    """A named link is the one inside the nodes (ib: between them), never another one in silence."""
    refused = link != "local" if name == "cpu" else link in ("nvlink", "local") and name in NO_NVLINK
    if refused:
        with pytest.raises(InputError, match=f"{name} has no {link} link: leave it away or name one of"):
            parse_cluster(f"2x2x{name}-{link}")
        return
    cluster = parse_cluster(f"2x2x{name}-{link}")
    assert link in (cluster.nodes[0].link.kind, cluster.network.kind)


def test_unknown_presets_list_the_known() -> None:
    with pytest.raises(UnknownKeyError, match=r"unknown model 'gpt9': known are gemma-2b, .*tiny-test"):
        model_preset("gpt9")
    with pytest.raises(UnknownKeyError, match=r"unknown device 'Z1': known are A100, .*cpu"):
        parse_cluster("2xZ1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak_flops_fp32", 0),
        ("peak_flops_half", -1),
        ("memory_bytes", 0),
        ("bandwidth_bytes_per_s", 0),
        ("sm_count", 0),
        ("launch_ns", -1),
        ("memory_bytes", 2**70),
        ("peak_w", math.inf),
        ("peak_w", math.nan),
        ("idle_w", 1e9),
        ("frequency_mhz", (1000, 0)),
        ("name", ""),
    ],
)
def test_a_wrong_device_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field if field != "idle_w" else "idle_w=1000000000.0"):
        dataclasses.replace(device_presets()["A40"], **{field: value})


@pytest.mark.parametrize(("field", "value"), [("bandwidth_bytes_per_s", 0), ("latency_ns", -1), ("latency_ns", 2**64)])
def test_a_wrong_link_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"pcie link: {field}={value}"):
        dataclasses.replace(LINKS["pcie"], **{field: value})


@pytest.mark.parametrize(
    "name", ["1000000x8xcpu", f"{MAX_DEVICES + 1}xA40", f"{10**17}x{10**17}xH100", f"1x{'9' * 5000}xcpu"]
)
def test_a_cluster_too_large_is_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match=r"at most 65536 devices|expected \[NODESx\]GPUSxDEVICE"):
        parse_cluster(name)


def test_clusters_have_an_end() -> None:
    assert parse_cluster(f"{MAX_DEVICES}xA40").size == MAX_DEVICES
    node = Node(gpus=MAX_DEVICES, link=LINKS["pcie"])
    device, network = device_presets()["A40"], LINKS["ib"]
    with pytest.raises(ValueError, match="131072 devices: a cluster has at most 65536"):
        Cluster(name="x", device=device, nodes=(node, node), network=network)
    with pytest.raises(ValueError, match="nodes is empty"):
        Cluster(name="x", device=device, nodes=(), network=network)


DEVICE = plain(device_presets()["A40"])
LINK = plain(Link(kind="pcie", bandwidth_bytes_per_s=1, latency_ns=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": {**DEVICE, "bandwidth_bytes_per_s": 0}}, "device: device A40: bandwidth_bytes_per_s=0: must be at least 1"),
        ({"nodes": [{"gpus": 2, "link": {**LINK, "bandwidth_bytes_per_s": 0}}]}, "c.json: nodes.0.link: pcie link: bandwidth"),
        ({"network": {**LINK, "latency_ns": -7}}, "c.json: network: pcie link: latency_ns=-7: must be at least 0"),
        ({"nodes": [{"gpus": 10**9, "link": "pcie"}]}, "1000000000 devices: a cluster has at most 65536"),
    ],
)  # fmt: skip
def test_a_wrong_cluster_file_names_the_place(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"device": "A40", "nodes": [{"gpus": 2, "link": "pcie"}], **change}))
    with pytest.raises(InputError) as caught:
        read_cluster(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["arrival_ns", "deadline_ns", "steps", "global_batch_samples", "billed_len_tokens"])
def test_a_task_fits_64_bits(field: str) -> None:
    task = Task(task_id="a", peft=LoRA(), dataset="sst2", billed_len_tokens=64, global_batch_samples=8)
    with pytest.raises(ValueError, match=f"{field}=18446744073709551616: must be at most"):
        dataclasses.replace(task, **{field: 2**64})
    with pytest.raises(ValueError, match=rf"{field}=\(about 2\^20000\)"):
        dataclasses.replace(task, **{field: 2**20000})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": 1e300}, "w.json: tasks.0: arrival_s=1e+300: must be at most 9223372036"),
        ({"deadline_s": 1e300}, "w.json: tasks.0: deadline_s=1e+300: must be at most"),
        ({"dataset": "/tmp"}, "w.json: tasks.0: dataset /tmp: /tmp is a directory: give the path of a file in it"),
        ({"dataset": "."}, "w.json: tasks.0: dataset .: . is a directory"),
        ({"dataset": "sst2@nope"}, "dataset sst2 has no counts of tokenizer 'nope': it has those of gpt2, llama2"),
        ({"dataset": "nope@gpt2"}, "unknown dataset 'nope@gpt2': known are alpaca_gpt4"),
        ({"peft": {"rank": 8}}, "w.json: tasks.0.peft.kind: is missing: add it, one of "),
        ({"peft": {"kind": "lorra"}}, 'w.json: tasks.0.peft.kind = "lorra": unknown: known are '),
    ],
)
def test_a_mistake_in_a_workload_is_one_line(change, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    task = {"task_id": "a", "peft": {"kind": "lora"}, "dataset": "sst2", "global_batch_samples": 8, **change}
    Path("w.json").write_text(json.dumps({"model": "tiny-llama", "tasks": [task]}))
    assert main(["plan", "--workload", "w.json", "--cluster", "cpu", "--policy", "greedy", "--out", "p.json"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["check", "."], ["plan", "--workload", ".", "--cluster", "cpu", "--policy", "greedy"]]
)
def test_a_directory_for_a_file_is_one_line(arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err == "muxtune: error: .: is a directory: give the name of a file\n"
