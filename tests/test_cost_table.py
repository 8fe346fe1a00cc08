"""The table of measurements: exact where measured, physical between, and a refusal outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.sim.cost.table import Curve, FittedTable, Point, Table, fit_table, leave_one_out
from muxtune.spec import ops
from muxtune.spec.cluster import LINKS, DeviceSpec, device_presets
from muxtune.spec.errors import ExtrapolationError, InputError
from muxtune.spec.files import read_noun, write_noun
from muxtune.spec.ops import Op
from muxtune.spec.plan import Provenance

CPU = device_presets()["cpu"]
GPU = device_presets()["A100"]


def curve(family: str, measured: Mapping[Any, int], shape: tuple[int, ...] = (), **more: Any) -> Curve:
    points = tuple(
        Point(size=size if isinstance(size, tuple) else (size,), p50_ns=ns, spread=0.1) for size, ns in measured.items()
    )
    filled: dict[str, Any] = {"direction": "forward", "dtype": "fp32", **more}
    return Curve(family=family, shape=shape, points=points, **filled)


def table(*curves: Curve, device: DeviceSpec = CPU, allow_extrapolation: bool = False) -> Table:
    return Table(fit_table(curves, device, 1000), device, allow_extrapolation)


def linear(tokens: int) -> Op:
    return ops.linear(tokens, (64, 64), False, "forward", "fp32", 4)


def norm(tokens: int) -> Op:
    return ops.pointwise("rmsnorm", tokens, (64,), 2, 4, "forward", "fp32", 4)


def roofline_ns(op: Op, device: DeviceSpec) -> float:
    return max(op.flops / device.peak_flops(op.dtype), op.moved_bytes / device.bandwidth_bytes_per_s) * 1e9


LINEAR = curve("linear", {16: 30_000, 64: 90_000, 256: 333_333}, (64, 64, 0))
NORM = curve("rmsnorm", {16: 1000, 64: 4000, 256: 16_000}, (64,))


@given(st.dictionaries(st.integers(1, 10**5), st.integers(1, 10**9), min_size=1, max_size=8))
def test_measured_points_are_returned_to_the_nanosecond(measured: dict[int, int]) -> None:
    model = table(curve("linear", measured, (64, 64, 0)))
    assert {n: model.latency(linear(n), CPU).p50_ns for n in measured} == measured


@given(
    st.sets(st.integers(1, 10**4), min_size=2, max_size=6),
    st.lists(st.integers(1, 10**7), min_size=6, max_size=6),
    st.data(),
)
def test_monotone_measurements_give_a_monotone_curve(sizes: set[int], times: list[int], data: st.DataObject) -> None:
    measured = dict(zip(sorted(sizes), sorted(times), strict=False))
    model = table(curve("linear", measured, (64, 64, 0)))
    asked = sorted(data.draw(st.lists(st.integers(min(sizes), max(sizes)), min_size=2, max_size=10)))
    found = [model.latency(linear(n), CPU).p50_ns for n in asked]
    assert found == sorted(found)


def test_constant_efficiency_follows_the_roofline_between_points() -> None:
    efficiency = 0.25
    sizes = (16, 512)
    exact = {n: round(roofline_ns(linear(n), CPU) / efficiency) for n in sizes}
    model = table(curve("linear", exact, (64, 64, 0)))
    for n in (17, 100, 511):
        assert model.latency(linear(n), CPU).p50_ns == pytest.approx(roofline_ns(linear(n), CPU) / efficiency, rel=1e-4)


def test_halfway_in_log_size_by_hand() -> None:
    # Pointwise work is proportional to tokens. Efficiency falls 4x from 16 to 256 tokens, so 2x at 64: 64 · 100 · 2.
    model = table(curve("rmsnorm", {16: 1600, 256: 102_400}, (64,)))
    assert model.latency(norm(64), CPU).p50_ns == 12_800


def test_outside_the_measured_range_is_refused_with_the_remedy() -> None:
    model = table(LINEAR)
    for tokens in (15, 257):
        with pytest.raises(ExtrapolationError) as refused:
            model.latency(linear(tokens), CPU)
        assert str(refused.value) == (
            f"linear forward fp32 (in=64, out=64, bias=0): tokens={tokens} is outside the measured 16..256: "
            "profile again with this workload, or allow it by --allow-extrapolation"
        )


def test_allowed_extrapolation_keeps_the_nearest_efficiency_and_is_flagged() -> None:
    model = table(LINEAR, allow_extrapolation=True)
    far, inside = model.latency(linear(1024), CPU), model.latency(linear(256), CPU)
    assert (far.extrapolated, inside.extrapolated) == (True, False)
    growth = roofline_ns(linear(1024), CPU) / roofline_ns(linear(256), CPU)
    assert far.p50_ns == pytest.approx(growth * inside.p50_ns, rel=1e-9)


@pytest.mark.parametrize("allow_extrapolation", [False, True])
def test_an_unmeasured_group_is_never_guessed(allow_extrapolation: bool) -> None:
    model = table(LINEAR, allow_extrapolation=allow_extrapolation)
    wide = ops.linear(64, (64, 128), False, "forward", "fp32", 4)
    with pytest.raises(ExtrapolationError, match=r"linear forward fp32 \(in=64, out=128, bias=0\) was not measured"):
        model.latency(wide, CPU)


def test_remainders_may_be_negative_and_stay_so() -> None:
    model = table(curve("mlp_overhead", {16: -100, 32: 100, 64: 300}, (64, 128)))

    def at(tokens: int) -> int:
        return model.latency(ops.overhead("mlp", tokens, (64, 128), "forward", "fp32"), CPU).p50_ns

    assert [at(n) for n in (16, 20, 24, 28, 32, 48, 64)] == [-100, -50, 0, 50, 100, 200, 300]


def test_host_constants() -> None:
    model = table(
        curve("launch", {1: 7}, dtype="host"), curve("instruction", {1: 9}, dtype="host", direction="backward")
    )
    assert model.latency(ops.host("launch"), CPU).p50_ns == 7
    assert model.latency(ops.host("instruction", "backward"), CPU).p50_ns == 9


def attention(rows: int, length: int) -> Op:
    return ops.attention(rows, length, (4, 2, 8), "forward", "fp32", 4)


def attention_curve(sizes: list[tuple[int, int]], efficiency: float = 0.5) -> Curve:
    return curve(
        "attention", {size: round(roofline_ns(attention(*size), CPU) / efficiency) for size in sizes}, (4, 2, 8)
    )


GRID = [(rows, length) for rows in (1, 4, 16) for length in (32, 128, 512)]


def test_attention_is_interpolated_in_rows_and_length() -> None:
    model = table(attention_curve(GRID))
    for size in [*GRID, (2, 64), (5, 300), (16, 33), (1, 511)]:
        expected = 2 * roofline_ns(attention(*size), CPU)
        assert model.latency(attention(*size), CPU).p50_ns == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ExtrapolationError, match=r"rows=17 is outside the measured 1\.\.16 and length=31 is outside"):
        model.latency(attention(17, 31), CPU)


def test_attention_by_hand_at_the_centre_of_four_corners() -> None:
    measured = {(1, 32): 1000, (4, 32): 8000, (1, 128): 32_000, (4, 128): 256_000}
    # Compute-bound work is a power law of rows and length, so the log-centre is the geometric mean of the corners.
    device = dataclasses.replace(CPU, bandwidth_bytes_per_s=10**15)
    model = table(curve("attention", measured, (4, 2, 8)), device=device)
    expected = (1000 * 8000 * 32_000 * 256_000) ** 0.25
    assert model.latency(attention(2, 64), device).p50_ns == round(expected)


def test_an_attention_grid_with_a_hole_is_refused() -> None:
    with pytest.raises(InputError, match=r"no full grid: \(4, 128\) is missing \(and 0 more\)"):
        table(attention_curve([s for s in GRID if s != (4, 128)]))


def test_links_use_the_measured_messages() -> None:
    model = table(curve("p2p", {1000: 5000, 100_000: 50_000}, dtype="bytes"))
    assert model.link_latency(ops.message("p2p", 1000), LINKS["local"]).p50_ns == 5000
    with pytest.raises(ExtrapolationError, match=r"all_reduce forward bytes \(ranks=2\) was not measured"):
        model.link_latency(ops.message("all_reduce", 4, (2,)), LINKS["local"])
    with pytest.raises(InputError, match="does not travel over a link"):
        model.link_latency(linear(16), LINKS["local"])


def test_links_fall_back_to_the_data_sheet_only_when_extrapolation_is_allowed() -> None:
    price = table(LINEAR, allow_extrapolation=True).link_latency(ops.message("p2p", 12_500), LINKS["ib"])
    assert (price.p50_ns, price.extrapolated) == (15_000 + 1000, True)


def test_left_out_points_of_perfect_data_cost_nothing() -> None:
    exact = curve("rmsnorm", {n: 100 * n for n in (16, 32, 64, 128)}, (64,))
    assert leave_one_out(exact, CPU) == pytest.approx((0.0, 0.0))
    assert max(leave_one_out(attention_curve(GRID), CPU)) < 1e-3


def test_left_out_point_by_hand() -> None:
    # Without 64 tokens the neighbours say 64 · 100; measured is 8000: |6400 − 8000| / 8000.
    bent = curve("rmsnorm", {16: 1600, 64: 8000, 256: 25_600}, (64,))
    assert leave_one_out(bent, CPU) == pytest.approx((0.2,))


def test_attention_leaves_out_whole_rows_and_lengths() -> None:
    # One interior number of rows (3 points) and one interior length (3 points).
    assert len(leave_one_out(attention_curve(GRID), CPU)) == 6


def test_a_remainder_near_0_is_held_against_its_largest_measurement() -> None:
    assert leave_one_out(curve("mlp_overhead", {16: 0, 32: 0, 48: 200}, (8, 8)), CPU) == pytest.approx((0.5,))


def test_family_errors_are_stored_and_used() -> None:
    bent = curve("rmsnorm", {16: 1600, 64: 8000, 256: 25_600}, (64,))
    fitted = fit_table([bent, curve("linear", {16: 10, 64: 40}, (64, 64, 0))], CPU, 1000)
    by_family = {f.family: f for f in fitted.families}
    assert by_family["rmsnorm"].held_out_mape == pytest.approx(0.2)
    assert (by_family["linear"].points, by_family["linear"].held_out_mape) == (2, None)
    model = Table(fitted, CPU)
    assert model.latency(norm(20), CPU).relative_error == pytest.approx(0.2)
    assert model.latency(linear(20), CPU).relative_error == 0.1  # the spread, where nothing could be left out


def test_host_time_is_within_on_a_cpu_and_beside_on_a_gpu() -> None:
    assert table(LINEAR).latency(linear(16), CPU).host_ns == 0
    assert table(LINEAR, device=GPU).latency(linear(16), GPU).host_ns == GPU.launch_ns
    points = tuple(Point(size=p.size, p50_ns=p.p50_ns, spread=0.1, host_ns=7000 + p.size[0]) for p in LINEAR.points)
    measured = Curve(family="linear", direction="forward", dtype="fp32", shape=(64, 64, 0), points=points)
    assert table(measured, device=GPU).latency(linear(16), GPU).host_ns == 7064


def test_another_device_is_refused() -> None:
    with pytest.raises(InputError, match="measured on cpu, not on A100: profile A100"):
        Table(fit_table([LINEAR], CPU, 1000), GPU)
    with pytest.raises(InputError, match="has no figures for A100"):
        table(LINEAR).latency(linear(16), GPU)


def test_the_id_names_device_and_content_but_not_provenance() -> None:
    plain = fit_table([LINEAR], CPU, 1000)
    elsewhere = fit_table([LINEAR], CPU, 1000, Provenance(environment="another host"))
    other = fit_table([NORM], CPU, 1000)
    assert Table(plain, CPU).model_id == Table(elsewhere, CPU).model_id
    assert Table(plain, CPU).model_id.startswith("table:cpu:")
    assert Table(plain, CPU).model_id != Table(other, CPU).model_id
    assert Table(plain, CPU).calibrated


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    fitted = fit_table([LINEAR, NORM, attention_curve(GRID)], CPU, 1234, Provenance(environment="here"))
    write_noun(fitted, tmp_path / "table.json")
    assert read_noun(FittedTable, tmp_path / "table.json") == fitted


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: curve("gemm", {1: 1}), "family='gemm'"),
        (lambda: curve("linear", {}, (1, 1, 0)), "has no points"),
        (lambda: curve("linear", {(1, 2): 5}, (1, 1, 0)), r"size \(1, 2\): expected \('tokens',\)"),
        (lambda: curve("linear", {0: 5}, (1, 1, 0)), "each at least 1"),
        (lambda: curve("linear", {1: 0}, (1, 1, 0)), "p50_ns=0"),
        (lambda: fit_table([LINEAR, LINEAR], CPU, 1), "two curves are of one operator group"),
        (lambda: FittedTable(version=2, device="cpu", reference_ns=1, curves=(), families=()), "reads version 1"),
    ],
)
def test_wrong_measurements_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
