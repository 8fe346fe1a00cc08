"""WorkerGroup: one long-lived process a rank, each on its own core; Programs are loaded once and run many times."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from muxtune.executor import messages
from muxtune.executor.interpreter import Mark
from muxtune.spec.catalogue import Subgraph, stage_subgraphs
from muxtune.spec.errors import ExecutionError, InputError
from muxtune.spec.layout import Layout
from muxtune.spec.plan import Provenance
from muxtune.spec.program import Bound, Instruction
from muxtune.spec.timeline import Span, Timeline, span_op

#: One OpenMP thread a rank, and a malloc that keeps freed memory: page faults double the time of large activations.
#: glibc ignores an mmap threshold above 32 MiB in silence, so mmap is switched off by its count instead.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "67108864",
}
START_TIMEOUT_S = 180.0


class WorkerGroup:
    """Use as a context manager; every method asks all ranks and waits for all answers."""

    def __init__(
        self, layout: Layout | int, device: Literal["cpu", "cuda"] = "cpu", timeout_s: float = 120.0, pin: bool = True
    ) -> None:
        self.ranks = layout if isinstance(layout, int) else layout.ranks
        self.timeout_s = timeout_s
        self.folder = tempfile.TemporaryDirectory(prefix="muxtune-")
        address = str(Path(self.folder.name) / "socket")
        key = secrets.token_hex(16)
        environment = {**os.environ, **WORKER_ENVIRONMENT, "MUXTUNE_AUTHKEY": key}
        self.log = (Path(self.folder.name) / "log").open("w+")
        with Listener(address, authkey=key.encode()) as listener:
            command = [sys.executable, "-m", "muxtune.executor.worker", address]
            self.processes = [
                subprocess.Popen([*command, str(r)], env=environment, stdout=self.log, stderr=self.log)
                for r in range(self.ranks)
            ]
            self.connections = self._accept(listener)
        cores = sorted(os.sched_getaffinity(0))
        rendezvous = f"file://{Path(self.folder.name) / 'rendezvous'}"
        for rank, connection in enumerate(self.connections):
            core = cores[rank % len(cores)] if pin and device == "cpu" else -1
            connection.send(
                messages.Hello(
                    rank=rank,
                    ranks=self.ranks,
                    device=device,
                    rendezvous=rendezvous,
                    core=core,
                    timeout_s=timeout_s,
                )
            )

    def _accept(self, listener: Listener) -> list[Connection]:
        """Wait for every worker to call in; a worker that dies first is reported with its log."""
        socket = listener._listener._socket  # type: ignore[attr-defined]  # the public Listener has no timeout
        socket.settimeout(1.0)
        found: dict[int, Connection] = {}
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while len(found) < self.ranks:
            try:
                connection = listener.accept()
                found[connection.recv()] = connection  # type: ignore[assignment]
            except TimeoutError:
                dead = [p.returncode for p in self.processes if p.poll() is not None]
                if dead or time.monotonic() > deadline_s:
                    self.close()
                    raise ExecutionError(f"a worker did not start (exit codes {dead}): {self._log_tail()}") from None
        return [found[r] for r in range(self.ranks)]

    def _log_tail(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return " | ".join(self.log.read().strip().splitlines()[-3:])

    def ask(self, message: Any) -> list[Any]:
        """Send one message to every rank and return the answers in rank order.

        Raises:
            ExecutionError: a rank failed, died or was silent for longer than the timeout. InputError: it refused its input.
        """
        for connection in self.connections:
            connection.send(message)
        answers: dict[int, Any] = {}
        deadline_s = time.monotonic() + self.timeout_s
        while len(answers) < self.ranks:
            open_ranks = {c: r for r, c in enumerate(self.connections) if r not in answers}
            ready = wait(list(open_ranks), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                self.close()
                raise ExecutionError(f"ranks {sorted(open_ranks.values())} were silent for {self.timeout_s:.0f} s")
            for rank in [r for c, r in open_ranks.items() if c in ready]:
                answers[rank] = self._receive(self.connections[rank], rank)
        return [answers[r] for r in range(self.ranks)]

    def _receive(self, connection: Any, rank: int) -> Any:
        try:
            answer = connection.recv()
        except EOFError:
            tail = self._log_tail()
            self.close()
            raise ExecutionError(f"rank {rank} died: {tail}") from None
        if isinstance(answer, messages.Failure):
            self.close()
            raise (InputError if answer.input_error else ExecutionError)(answer.message)
        return answer

    def load(self, name: str, bound: Bound, seed: int = 0, random_adapters: bool = False) -> None:
        """Build a plan's backbones and adapters on every rank.

        Raises:
            InputError: an instance uses a rank that the group lacks.
        """
        for instance in bound.plan.instances:
            if max(instance.devices) >= self.ranks:
                raise InputError(
                    f"instance {instance.name} uses devices {list(instance.devices)}: the group has ranks 0..{self.ranks - 1}"
                )
        self.ask(messages.Load(name=name, bound=bound, seed=seed, random_adapters=random_adapters))

    def run(self, name: str, memory: bool = False) -> list[messages.RankResult]:
        """Run a loaded Program once on every rank."""
        return self.ask(messages.Run(name=name, memory=memory))

    def close(self) -> None:
        """Hang up, and end workers that do not leave by themselves."""
        for connection in getattr(self, "connections", []):
            connection.close()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.log.close()
        self.folder.cleanup()

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.log.closed:
            self.close()


def measured_timeline(bound: Bound, results: list[messages.RankResult], environment: str = "") -> Timeline:
    """One Timeline from the ranks' marks; the machine's monotonic clock is common to them. Time 0 is the first start."""
    origin_ns = min(m.start_ns for r in results for m in r.marks)
    names = _Names(bound)
    spans = [names.span(r.rank, mark, origin_ns) for r in results for mark in r.marks]
    counted = [r.peak_bytes for r in results if r.peak_bytes is not None]
    return Timeline(
        source="executor",
        program_digest=bound.program.digest(),
        seed=bound.program.seed,
        steps=bound.program.steps,
        spans=tuple(spans),
        peak_bytes=tuple(counted) if counted else None,
        provenance=Provenance(environment=environment),
    )


class _Names:
    """What a mark was: the instruction or launched subgraph behind it, and the tasks it carried."""

    def __init__(self, bound: Bound) -> None:
        self.plan = bound.plan
        self.lists = {r.rank: r.instructions for r in bound.program.ranks}
        self.works = {w.key: w for w in bound.program.units}

    def span(self, rank: int, mark: Mark, origin_ns: int) -> Span:
        """The Timeline's span of a mark, times relative to the first start."""
        x = self.lists[rank][mark.index]
        op, stream, tasks = span_op(x), "p2p" if x.op in ("send", "recv") else "compute", self._tasks(x, mark.htask)
        if mark.subgraph >= 0:
            subgraph = self._subgraph(rank, x, mark.subgraph)
            op, stream = subgraph.name, "comm" if subgraph.kind == "collective" else "compute"
        return Span(
            rank=rank,
            stream=stream,  # type: ignore[arg-type]
            op=op,
            index=mark.index,
            key=x.key,
            tasks=tasks,
            start_ns=mark.start_ns - origin_ns,
            end_ns=mark.end_ns - origin_ns,
            subgraph=mark.subgraph,
            tag=x.tag,
        )

    def _tasks(self, x: Instruction, htask: int) -> tuple[str, ...]:
        if x.op == "step":
            return (x.task or "",)
        batches = [b for b in self.works[x.key].batches if htask in (-1, b.htask)]
        return tuple(task for b in batches for task, _, _ in b.segments())

    def _subgraph(self, rank: int, x: Instruction, index: int) -> Subgraph:
        instance = self.plan.instances[x.key.instance]
        stage = instance.layout.stage_of(instance.devices.index(rank))
        return stage_subgraphs(instance.layout, stage, "forward" if x.op == "forward" else "backward")[index]
