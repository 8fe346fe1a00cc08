"""The CUDA side of the executor with a fake in torch.cuda's place: what waits for what, and what is timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muxtune.executor import comm
from muxtune.executor.comm import Exchange, Jitter, StreamComm, make_comm, own_device
from muxtune.executor.peers import Peers
from muxtune.executor.reference import timed_by_events

DEVICE = torch.device("cuda", 1)


class FakeCuda:
    """Streams and events that only write down what was asked of them; an event is worth the number of lines before it, in ms."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stack = ["main"]

    def set_device(self, index: int) -> None:
        self.lines.append(f"device {index}")

    def synchronize(self, device: torch.device) -> None:
        self.lines.append("synchronize")

    def current_stream(self, device: torch.device) -> Any:
        return self._stream(self.stack[-1])

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 # torch's name
        return self._stream("side")

    def _stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.lines.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.lines.append(f"{name} waits for event {event.at}"),
        )

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.stack.append(stream.name)
        yield
        self.stack.pop()

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802 # torch's name
        assert enable_timing
        event = SimpleNamespace(at=-1, synchronize=lambda: self.lines.append("host waits"))

        def record() -> None:
            event.at = len(self.lines)
            self.lines.append(f"event {event.at} on {self.stack[-1]}")

        event.record = record
        event.elapsed_time = lambda later: float(later.at - event.at)
        return event


def test_a_collective_runs_on_the_second_stream_and_only_its_user_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    tensor: Any = SimpleNamespace(record_stream=lambda s: cuda.lines.append(f"keep for {s.name}"))

    def start(exchange: Exchange, peers: Peers, gloo: bool) -> Any:
        assert not gloo
        cuda.lines.append(f"{exchange.kind} on {cuda.stack[-1]}")
        return SimpleNamespace(wait=lambda: cuda.lines.append(f"{cuda.stack[-1]} waits for work")), lambda: tensor

    monkeypatch.setattr(comm, "_start", start)
    stage = StreamComm(Jitter(), DEVICE, cuda)
    used: list[Any] = []
    pending = stage.start(Exchange(kind="all_reduce", tensor=tensor, finish=used.append), Peers())
    assert cuda.lines == [
        "side waits for main",
        "event 1 on side",
        "all_reduce on side",
        "side waits for work",
        "event 4 on side",
        "keep for side",
    ]
    assert used == []
    del cuda.lines[:]
    pending.settle()
    assert cuda.lines == ["main waits for event 4", "keep for main"]
    assert used == [tensor]
    assert (pending.start.at, pending.end.at) == (1, 4)


def test_stamps_are_events_on_the_machines_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 7_000)
    stage = StreamComm(Jitter(), DEVICE, cuda)
    stage.begin()
    assert cuda.lines == ["synchronize", "event 1 on main"]
    cuda.lines.append("compute")
    stamp = stage.stamp()
    assert "host waits" not in cuda.lines
    assert stage.resolve(stamp) == 7_000 + 2_000_000
    assert cuda.lines[-1] == "host waits"


def test_every_rank_of_a_node_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cpu", 3, cuda) == torch.device("cpu")
    assert cuda.lines == []
    assert own_device("cuda", 3, cuda) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda", 5, cuda) == torch.device("cuda", 1)
    assert cuda.lines == ["device 3", "device 1"]
    assert isinstance(make_comm(torch.device("cpu")), comm.HostComm)


def test_the_reference_is_timed_on_the_device() -> None:
    cuda = FakeCuda()
    assert timed_by_events(lambda: cuda.lines.append("gemm"), cuda) == 2_000_000
    assert cuda.lines == ["event 0 on main", "gemm", "event 2 on main", "host waits"]


def test_parts_go_to_the_tp_rank_they_belong_to_however_devices_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's group has tp index 1 first: scatter hands the first part of what it is given to its first member."""
    peers = Peers(tp="group", order=(1, 0))
    given: dict[str, Any] = {}

    def scatter(part: Any, whole: Any, group: Any, async_op: bool) -> None:
        given["scatter"] = whole.flatten().tolist()

    def gather(whole: Any, part: Any, group: Any, async_op: bool) -> None:
        whole.view(2, -1).copy_(torch.stack([part.flatten() + 10, part.flatten()]))

    monkeypatch.setattr(comm, "_scatter", scatter)
    monkeypatch.setattr(comm, "_gather", gather)
    tokens = torch.arange(4.0).view(4, 1, 1)
    comm._start(Exchange(kind="reduce_scatter", tensor=tokens, finish=lambda x: None), peers, gloo=False)
    assert given["scatter"] == [2, 3, 0, 1]
    mine = tokens[:2]
    _, result = comm._start(Exchange(kind="all_gather", tensor=mine, finish=lambda x: None), peers, gloo=False)
    assert result().flatten().tolist() == [0, 1, 10, 11]
