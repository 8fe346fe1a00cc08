"""The roofline: figures that a pocket calculator confirms, and monotony."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.sim.cost._links import usual_link
from muxtune.sim.cost.base import CostModel
from muxtune.sim.cost.roofline import Roofline, RooflineConfig
from muxtune.spec import ops
from muxtune.spec.cluster import LINKS, DeviceSpec, device_presets
from muxtune.spec.errors import InputError
from muxtune.spec.ops import Direction, Op

#: 1 PFLOP/s attainable at 0.6 of the peak, 0.75 TB/s attainable of 1 TB/s, 400 W above idle.
DEVICE = DeviceSpec(
    name="round",
    peak_flops_fp32=10**15,
    peak_flops_half=10**15,
    memory_bytes=10**9,
    bandwidth_bytes_per_s=10**12,
    sm_count=1,
    launch_ns=5000,
    idle_w=100.0,
    peak_w=500.0,
    frequency_mhz=(),
)
tokens = st.integers(min_value=1, max_value=10**5)
grown = st.integers(min_value=0, max_value=10**4)
directions = st.sampled_from(("forward", "backward"))


def fixed(flops: int, moved_bytes: int) -> Op:
    return Op(
        family="residual",
        direction="forward",
        dtype="fp16",
        size=(1,),
        shape=(1,),
        flops=flops,
        moved_bytes=moved_bytes,
    )


def test_compute_bound_and_bandwidth_bound_by_hand() -> None:
    assert Roofline().latency(fixed(6 * 10**14, 0), DEVICE).p50_ns == 10**9
    assert Roofline().latency(fixed(1, 75 * 10**10), DEVICE).p50_ns == 10**9
    assert Roofline().latency(fixed(1, 1), DEVICE).p50_ns == 1


def test_it_says_that_nothing_was_measured() -> None:
    model = Roofline()
    assert isinstance(model, CostModel)
    assert (model.model_id, model.calibrated) == ("roofline", False)
    assert model.latency(fixed(1, 1), DEVICE).relative_error == 0.5


def test_host_issues_one_launch_a_kernel() -> None:
    forward = ops.lora(8, (16, 16), 4, "forward", "fp16", 2)
    backward = ops.lora(8, (16, 16), 4, "backward", "fp16", 2)
    assert Roofline().latency(fixed(1, 1), DEVICE).host_ns == 5000
    assert Roofline().latency(forward, DEVICE).host_ns == 2 * 5000
    assert Roofline().latency(backward, DEVICE).host_ns == 4 * 5000


@pytest.mark.parametrize(
    "op",
    [
        ops.host("launch"),
        ops.host("instruction"),
        ops.overhead("mlp", 8, (4, 4), "forward", "fp16"),
        ops.message("send", 8),
        ops.message("recv", 8),
    ],
)
def test_host_families_have_no_data_sheet_price(op: Op) -> None:
    price = Roofline().latency(op, DEVICE)
    assert (price.p50_ns, price.host_ns, price.joules) == (0, 0, 0.0)


def test_ring_and_p2p_by_hand() -> None:
    link = LINKS["ib"]  # 12.5 GB/s, 15 µs
    assert Roofline().link_latency(ops.message("p2p", 125_000_000), link).p50_ns == 15_000 + 10_000_000
    ring = Roofline().link_latency(ops.message("all_reduce", 125_000_000, (4,)), link)
    assert ring.p50_ns == 6 * 15_000 + 15_000_000
    assert Roofline().link_latency(ops.message("all_reduce", 4, (2,)), link).p50_ns == 2 * 15_000 + 1


def test_halves_of_a_ring_by_hand() -> None:
    link = LINKS["ib"]
    for family in ("reduce_scatter", "all_gather"):
        half = Roofline().link_latency(ops.message(family, 125_000_000, (4,)), link)
        assert half.p50_ns == 3 * 15_000 + 7_500_000


def test_small_all_reduces_are_trees_and_large_ones_rings() -> None:
    link = LINKS["ib"]
    ring, tree = (Roofline(RooflineConfig(all_reduce=a)) for a in ("ring", "tree"))  # type: ignore[arg-type]
    assert (ring.model_id, tree.model_id) == ("roofline:all_reduce=ring", "roofline:all_reduce=tree")
    for size_bytes, ring_ns, tree_ns in (
        (12_500, 14 * 15_000 + 1_750, 6 * 15_000 + 2_000),
        (12_500_000, 14 * 15_000 + 1_750_000, 6 * 15_000 + 2_000_000),
    ):
        op = ops.message("all_reduce", size_bytes, (8,))
        assert ring.link_latency(op, link).p50_ns == ring_ns
        assert tree.link_latency(op, link).p50_ns == tree_ns
        assert Roofline().link_latency(op, link).p50_ns == min(ring_ns, tree_ns)
    with pytest.raises(ValueError, match="all_reduce='star'"):
        RooflineConfig(all_reduce="star")  # type: ignore[arg-type]


def test_only_messages_travel_over_links() -> None:
    with pytest.raises(InputError, match="'residual' does not travel over a link"):
        Roofline().link_latency(fixed(1, 1), LINKS["ib"])


def test_a_collective_without_a_link_uses_the_devices_own() -> None:
    op = ops.message("all_reduce", 10**6, (2,))
    for device in (*device_presets().values(), DEVICE):
        assert Roofline().latency(op, device) == Roofline().link_latency(op, usual_link(device))
    assert usual_link(device_presets()["A40"]).bandwidth_bytes_per_s == 56_250_000_000
    assert usual_link(device_presets()["cpu"]).kind == "local"


def test_energy_above_idle_by_hand() -> None:
    # 1 s at the attainable 0.6 of the peak: 0.6 of the 400 W above idle.
    assert Roofline().latency(fixed(6 * 10**14, 0), DEVICE).joules == pytest.approx(240.0)
    assert Roofline().latency(fixed(0, 75 * 10**10), DEVICE).joules == pytest.approx(300.0)


@given(tokens, grown, directions)
def test_latency_grows_with_size(small: int, more: int, direction: Direction) -> None:
    def prices(n: int) -> list[int]:
        calls = (
            ops.linear(n, (768, 3072), False, direction, "fp16", 2),
            ops.lora(n, (768, 3072), 8, direction, "fp16", 2),
            ops.attention(4, n, (12, 12, 64), direction, "fp16", 2),
            ops.attention(n, 64, (12, 12, 64), direction, "fp16", 2),
            ops.pointwise("rmsnorm", n, (768,), 2, 4, direction, "fp16", 2),
            ops.adamw(n, 2),
        )
        model = Roofline()
        found = [model.latency(op, device_presets()["A100"]).p50_ns for op in calls]
        return [
            *found,
            *(model.link_latency(ops.message(f, n, (4,)), LINKS["pcie"]).p50_ns for f in ("p2p", "all_reduce")),
        ]

    assert all(1 <= a <= b for a, b in zip(prices(small), prices(small + more), strict=True))
