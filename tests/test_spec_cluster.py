"""Cluster names are parsed; devices, nodes and links follow from them."""

from __future__ import annotations

import pytest

from muxtune.spec.cluster import NVLINK_BYTES_PER_S, device_presets, parse_cluster
from muxtune.spec.errors import InputError
from muxtune.spec.units import GIB


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "device", "inside", "between"),
    [
        ("4xA40-nvlink", 1, 4, "A40", "nvlink", "ib"),
        ("4xA40", 1, 4, "A40", "nvlink", "ib"),
        ("8x2xA40-ib", 8, 16, "A40", "nvlink", "ib"),
        ("32x8xH100-ib", 32, 256, "H100", "nvlink", "ib"),
        ("1xH100", 1, 1, "H100", "nvlink", "ib"),
        ("h100", 1, 1, "H100", "nvlink", "ib"),
        ("2xA40-pcie", 1, 2, "A40", "pcie", "ib"),
        ("4xL40S", 1, 4, "L40S", "pcie", "ib"),
        ("2x4xRTX4090", 2, 8, "RTX4090", "pcie", "ib"),
        ("cpu", 1, 1, "cpu", "local", "local"),
        ("2xcpu", 1, 2, "cpu", "local", "local"),
    ],
)
def test_names(name: str, nodes: int, gpus: int, device: str, inside: str, between: str) -> None:
    cluster = parse_cluster(name)
    assert (len(cluster.nodes), cluster.size, cluster.device.name) == (nodes, gpus, device)
    assert {n.link.kind for n in cluster.nodes} == {inside}
    assert cluster.network.kind == between
    assert cluster.name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("4xFoo", r"unknown device 'Foo': known are A100, A40, B200, .*cpu"),
        ("4xA40-foo", r"unknown link 'foo': known are ib, local, nvlink, pcie"),
        ("0xA40", "node and device counts must be at least 1"),
        ("0x4xA40", "node and device counts must be at least 1"),
        ("4x", r"cluster '4x': expected \[NODESx\]GPUSxDEVICE\[-LINK\]"),
        ("", "expected"),
        ("2x2x2xA40", "expected"),
        ("-4xA40", "expected"),
        ("4 x A40", "expected"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_cluster(name)


def test_links_depend_on_the_node() -> None:
    cluster = parse_cluster("2x2xA40-ib")
    assert [cluster.node_of(d) for d in range(4)] == [0, 0, 1, 1]
    assert cluster.link(0, 1) == cluster.link(2, 3) == cluster.nodes[0].link
    assert cluster.link(1, 2) == cluster.link(3, 0) == cluster.network
    with pytest.raises(IndexError):
        cluster.node_of(4)


def test_nvlink_has_the_device_s_bandwidth() -> None:
    for name, rate in NVLINK_BYTES_PER_S.items():
        assert parse_cluster(f"2x{name}").nodes[0].link.bandwidth_bytes_per_s == rate
    assert parse_cluster("2xA40-nvlink").nodes[0].link.latency_ns < parse_cluster("2xA40-pcie").nodes[0].link.latency_ns


def test_device_presets() -> None:
    devices = device_presets()
    assert devices["A40"].memory_bytes == 48 * GIB
    assert devices["H100"].memory_bytes == 80 * GIB
    assert devices["A40"].peak_flops("bf16") == devices["A40"].peak_flops("fp16") == 149_700_000_000_000
    assert devices["A40"].peak_flops("fp32") == 37_400_000_000_000
    assert [name for name, d in devices.items() if d.is_cpu] == ["cpu"]
    for device in devices.values():
        assert 0 < device.idle_w < device.peak_w
        assert device.peak_flops_half >= device.peak_flops_fp32 > 0
        assert list(device.frequency_mhz) == sorted(device.frequency_mhz, reverse=True)
