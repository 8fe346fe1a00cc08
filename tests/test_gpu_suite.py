"""The GPU suite end to end on tiny shapes: every step runs, a failing one is reported, results are there at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments.gpu_context import Context, preset_of
from muxtune.experiments.gpu_head_to_head import REAL
from muxtune.experiments.gpu_suite import STEPS, main, run_suite
from muxtune.experiments.gpu_targets import judge
from muxtune.profiler.clocks import EventClock, Sensors, copies_of
from muxtune.profiler.corun import _on_two_streams
from muxtune.sim.cost.interference import CoRunGrid
from muxtune.sim.cost.table import FittedTable
from muxtune.spec.errors import NoAnswerError
from muxtune.spec.files import read_noun

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("gpu")
    assert main(["--device", "cpu", "--out", str(out), "--budget", "5m"]) == 0
    return json.loads((out / "results.json").read_text()), out


def test_every_step_runs_on_tiny_shapes(suite: tuple[dict[str, Any], Path]) -> None:
    body, out = suite
    states = {s["step"]: s["state"] for s in body["steps"]}
    assert list(states) == list(STEPS)
    assert {name for name, state in states.items() if state != "done"} <= {"transformer engine"}
    results = {s["step"]: s["result"] for s in body["steps"]}
    loop = [r for r in results["kernel correctness"]["rows"] if r["back_end"] == "loop"]
    assert {r["dtype"] for r in loop} == {"fp32", "fp16", "bf16"}
    assert all(r["refused"] == 0 and 0 < r["error"] <= r["tolerance"] for r in loop)
    assert results["kernel correctness"]["wrong"] == []
    rows = {r["way"]: r for r in results["head to head"]["rows"]}
    assert {REAL, "Megatron one at a time", "batch-all", "muxtune"} <= rows.keys()
    assert all(r["reason"] == "" and r["billed_tokens_per_s"] > 0 for r in rows.values())
    assert not body["measured"]
    assert all(t["state"] == "not measurable here" and t["figure"] > 0 for t in body["targets"])
    files = sorted(out.iterdir())
    assert len(files) <= 8
    assert all(f.stat().st_size < 16 * 2**20 for f in files)
    assert read_noun(CoRunGrid, out / "interference.json").points
    families = {c.family for c in read_noun(FittedTable, out / "costs-tiny-shape.json").curves}
    assert {"linear", "lora", "attention", "chunk_attention", "launch", "mlp_overhead"} <= families
    assert "Tiny shapes on a CPU" in (out / "summary.md").read_text()


def test_what_a_layer_keeps_is_measured(suite: tuple[dict[str, Any], Path]) -> None:
    """By hand for tiny-test (fp32): the norm pieces keep their input and one statistic a token, 4 · (32 + 1) bytes."""
    body, _ = suite
    kept = next(s["result"]["kept_by_a_layer"] for s in body["steps"] if s["step"] == "memory")
    tokens = 64
    assert kept["pieces"]["norm1"] == kept["pieces"]["norm2"] == tokens * 4 * (32 + 1)
    assert sum(kept["pieces"].values()) == tokens * kept["measured_bytes_per_token"]
    assert kept["error"] == pytest.approx(kept["predicted_bytes_per_token"] / kept["measured_bytes_per_token"] - 1)
    assert 0 <= kept["error"] < 0.1  # proj's input is the attention's output here (docs/validation.md)


def test_first_losses_are_equal_wherever_the_maths_is(suite: tuple[dict[str, Any], Path]) -> None:
    body, _ = suite
    rows = next(s["result"]["rows"] for s in body["steps"] if s["step"] == "head to head")
    wanted = rows[0]["first_losses"]
    for row in rows:
        assert row["first_losses"] == pytest.approx(wanted, rel=1e-4), row["way"]


def test_a_failing_step_is_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    def broken(context: Context) -> dict[str, Any]:
        raise RuntimeError("no luck")

    def absent(context: Context) -> dict[str, Any]:
        raise NoAnswerError("nothing here")

    def fine(context: Context) -> dict[str, Any]:
        assert json.loads((context.out / "results.json").read_text())["steps"][0]["state"] == "failed"
        return {"figure": 1}

    body = run_suite("cpu", tmp_path, steps={"a": broken, "b": absent, "c": fine})
    assert [(s["state"], s["reason"]) for s in body["steps"]] == [
        ("failed", "RuntimeError: no luck"),
        ("not measurable here", "nothing here"),
        ("done", ""),
    ]
    late = run_suite("cpu", tmp_path, budget_s=0.0, steps={"c": fine})
    assert late["steps"][0]["state"] == "skipped"


def test_targets_by_hand() -> None:
    """3.5x over the real baseline is met, 1.2x over batch-all is missed, what did not fit is said."""
    rates = {REAL: 100.0, "batch-all": 300.0, "muxtune": 340.0, "muxtune:alignment=varlen": 350.0}
    rows = [{"way": way, "billed_tokens_per_s": rate} for way, rate in rates.items()]
    rows.append({"way": "Megatron one at a time", "reason": "InfeasibleError: too large"})
    peaks = {"one task": 20, "fused in one pass": 120}
    results = {
        "head to head": {"rows": rows},
        "memory": {"tasks": 32, "rows": [{"way": w, "peak_bytes": b} for w, b in peaks.items()]},
    }
    found = judge(results, on_gpu=True)
    assert [(t["state"], t["figure"]) for t in found] == [
        ("met", 3.5),
        ("not measurable here", None),
        ("missed", 350 / 300),
        ("met", 32 * 20 / 120),
        ("not measurable here", None),
    ]
    assert "too large" in found[1]["why"]
    assert judge({}, on_gpu=True)[0]["state"] == "not measurable here"


def test_presets_by_the_drivers_name() -> None:
    assert preset_of("NVIDIA H100 80GB HBM3") == "H100"
    assert preset_of("NVIDIA GeForce RTX 4090") == "RTX4090"
    with pytest.raises(NoAnswerError, match="no device preset"):
        preset_of("Abacus")


class FakeCuda:
    """Streams whose calls take as long as they say; a second stream slows the first down by half."""

    def __init__(self) -> None:
        self.now_ms: dict[str, float] = {"main": 0.0, "side": 0.0}
        self.stream_name, self.log = "main", list[str]()

    def run(self, ms: float) -> None:
        busy = self.stream_name == "main" and self.now_ms["side"] > self.now_ms["main"]
        self.now_ms[self.stream_name] += ms * (1.5 if busy else 1.0)

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802 # torch's name
        cuda = self

        class Event:
            at_ms = 0.0

            def record(self) -> None:
                self.at_ms = cuda.now_ms[cuda.stream_name]
                cuda.log.append("record")

            def synchronize(self) -> None:
                cuda.log.append("wait")

            def elapsed_time(self, other: Any) -> float:
                return float(other.at_ms - self.at_ms)

        return Event()

    def Stream(self) -> str:  # noqa: N802 # torch's name
        return "side"

    def stream(self, name: str) -> Any:
        cuda = self

        class Use:
            def __enter__(self) -> None:
                cuda.stream_name = name

            def __exit__(self, *unused: object) -> None:
                cuda.stream_name = "main"

        return Use()

    def synchronize(self) -> None:
        latest = max(self.now_ms.values())
        self.now_ms = dict.fromkeys(self.now_ms, latest)

    def _sleep(self, cycles: int) -> None:
        self.log.append("spin")
        self.run(1.0)

    def get_device_properties(self, device: Any) -> Any:
        return type("Properties", (), {"L2_cache_size": 50 * 2**20})


def test_events_leave_out_the_spin_before_them() -> None:
    cuda = FakeCuda()

    def call() -> str:
        cuda.run(2.0)
        return "done"

    (direction, device_ns, host_ns), result = EventClock(cuda).timed("forward", call)
    assert (direction, device_ns, result) == ("forward", 2_000_000, "done")
    assert host_ns < 1_000_000_000
    assert cuda.log == ["spin", "record", "record", "wait"]


def test_weights_rotate_over_more_than_twice_the_l2() -> None:
    cuda = torch.device("cuda", 0)
    assert copies_of(32 * 2**20, cuda, FakeCuda()) == 5
    assert 4 * 32 > 2 * 50  # MiB between two uses of one weight
    assert copies_of(2**40, cuda, FakeCuda()) == 2
    assert copies_of(1, torch.device("cpu")) == 1


def test_a_neighbour_on_a_second_stream_is_there_all_along() -> None:
    cuda = FakeCuda()
    assert _on_two_streams(lambda: cuda.run(2.0), lambda: cuda.run(0.5), cuda) == pytest.approx(1.5)


class FakeNvml:
    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        self.energy_mj = 0

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        self.energy_mj += 2_500
        return self.energy_mj

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        return 1_980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return 4 + 1


def test_sensors() -> None:
    sensors = Sensors(torch.device("cuda", 0), FakeNvml())
    before = sensors.read()
    found = sensors.since(before)
    assert found == {"energy_j": 2.5, "sm_clock_mhz": [1980, 1980], "throttled": ["power cap"]}
    assert Sensors(torch.device("cpu")).since(None) == {}
