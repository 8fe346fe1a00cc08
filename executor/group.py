"""WorkerGroup: one long-lived process a rank, each on its own core; Programs are loaded once and run many times."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

from muxtune.executor import messages
from muxtune.executor.failures import exit_text, keep_log, log_tail
from muxtune.executor.reports import Mark
from muxtune.spec.catalogue import Subgraph, stage_subgraphs
from muxtune.spec.errors import ExecutionError, InputError
from muxtune.spec.layout import Layout
from muxtune.spec.plan import Plan, Provenance
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
#: What cuBLAS needs to give the same bits twice.
DETERMINISTIC_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
START_TIMEOUT_S = 180.0
#: A process that closed its connection is given so long to be seen as ended.
DEATH_S = 0.2


class WorkerGroup:
    """Use as a context manager; every method asks all ranks and waits for all answers.

    `deterministic`: an operator that has no deterministic form raises. `environment` is added to the workers'.
    """

    def __init__(
        self,
        layout: Layout | int,
        device: Literal["cpu", "cuda"] = "cpu",
        timeout_s: float = 120.0,
        pin: bool = True,
        deterministic: bool = False,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.ranks = layout if isinstance(layout, int) else layout.ranks
        self.timeout_s, self.ended = timeout_s, ""
        self.folder = tempfile.TemporaryDirectory(prefix="muxtune-")
        address = str(Path(self.folder.name) / "socket")
        key = secrets.token_hex(16)
        variables = {**os.environ, **WORKER_ENVIRONMENT, **environment, "MUXTUNE_AUTHKEY": key}
        variables |= DETERMINISTIC_ENVIRONMENT if deterministic else {}
        self.log = (Path(self.folder.name) / "log").open("w+")
        with Listener(address, authkey=key.encode()) as listener:
            command = [sys.executable, "-m", "muxtune.executor.worker", address]
            self.processes = [
                subprocess.Popen([*command, str(r)], env=variables, stdout=self.log, stderr=self.log)
                for r in range(self.ranks)
            ]
            self.connections = self._accept(listener)
        cores = sorted(os.sched_getaffinity(0))
        rendezvous = f"file://{Path(self.folder.name) / 'rendezvous'}"
        for rank, connection in enumerate(self.connections):
            core = cores[rank % len(cores)] if pin and device == "cpu" else -1
            hello = messages.Hello(
                rank=rank,
                ranks=self.ranks,
                device=device,
                rendezvous=rendezvous,
                core=core,
                timeout_s=timeout_s,
                deterministic=deterministic,
            )
            self._send(connection, rank, hello)

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
                if any(p.poll() is not None for p in self.processes) or time.monotonic() > deadline_s:
                    raise self._failed(f"a worker did not start within {START_TIMEOUT_S:.0f} s") from None
        return [found[r] for r in range(self.ranks)]

    def _log_text(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def agree(self, step: Callable[[], Any]) -> Any:
        """Run a step that is to be done once; here there is one process that speaks."""
        return step()

    def ask(self, message: Any) -> list[Any]:
        """Send one message to every rank and return the answers in rank order.

        Raises:
            ExecutionError: a rank failed, died or was silent for longer than the timeout. InputError: it refused its input.
        """
        if self.log.closed:
            raise ExecutionError(self.ended or "the worker group was closed")
        for rank, connection in enumerate(self.connections):
            self._send(connection, rank, message)
        answers: dict[int, Any] = {}
        deadline_s = time.monotonic() + self.timeout_s
        while len(answers) < self.ranks:
            open_ranks = {c: r for r, c in enumerate(self.connections) if r not in answers}
            ready = wait(list(open_ranks), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                silent = f"ranks {sorted(open_ranks.values())} were silent for {self.timeout_s:.0f} s"
                raise self._failed(silent)
            for rank in [r for c, r in open_ranks.items() if c in ready]:
                answers[rank] = self._receive(self.connections[rank], rank)
        return [answers[r] for r in range(self.ranks)]

    def _send(self, connection: Connection, rank: int, message: Any) -> None:
        try:
            connection.send(message)
        except OSError:
            raise self._failed(f"rank {rank} died") from None

    def _receive(self, connection: Any, rank: int) -> Any:
        try:
            answer = connection.recv()
        except (EOFError, OSError):
            raise self._failed(f"rank {rank} died") from None
        if isinstance(answer, messages.Failure):
            if answer.input_error:
                self.close()
                raise InputError(answer.message)
            raise self._failed(answer.message, answer.details)
        return answer

    def _failed(self, reason: str, details: str = "") -> ExecutionError:
        """End the group. A process that is dead is the cause, whoever noticed first: it is named, with how it ended."""
        time.sleep(DEATH_S)
        codes = {r: p.poll() for r, p in enumerate(self.processes)}
        dead = "; ".join(f"rank {r} died: {exit_text(c)}" for r, c in codes.items() if c is not None)
        self._end(patience_s=0.0)
        log = self._log_text()
        self.close()
        tail = f"{dead}: {log_tail(log)}" if dead else reason
        self.ended = tail + keep_log(f"{reason}\n{details}\n{log}")
        return ExecutionError(self.ended)

    def load(self, name: str, bound: Bound, seed: int = 0, random_adapters: bool = False, ending: bool = False) -> None:
        """Build a plan's backbones and adapters on every rank; `ending`: tasks end at their `steps`.

        Raises:
            InputError: an instance uses a rank that the group lacks, or the plan what only the simulator has.
        """
        require_runnable(bound.plan)
        for instance in bound.plan.instances:
            if max(instance.devices) >= self.ranks:
                raise InputError(
                    f"instance {instance.name} uses devices {list(instance.devices)}: the group has ranks 0..{self.ranks - 1}"
                )
        self.ask(messages.Load(name=name, bound=bound, seed=seed, random_adapters=random_adapters, ending=ending))

    def run(self, name: str, memory: bool = False, reference: bool = True) -> list[messages.RankResult]:
        """Run a loaded Program once on every rank."""
        return self.ask(messages.Run(name=name, memory=memory, reference=reference))

    def close(self) -> None:
        """Hang up, and end workers that do not leave by themselves."""
        self._end(patience_s=5.0)
        self.log.close()
        self.folder.cleanup()

    def _end(self, patience_s: float) -> None:
        for connection in getattr(self, "connections", []):
            connection.close()
        for process in self.processes:
            try:
                process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.log.closed:
            self.close()


def require_runnable(plan: Plan, source: str = "") -> None:
    """Refuse what the simulator can do and the executor cannot yet; `source` stands before the sentence.

    Raises:
        InputError: names the feature and the way round it.
    """
    if plan.residency == "swapped":
        raise InputError(
            f"{source}residency `swapped`: the executor keeps every backbone: plan again with residency=resident"
        )
    if plan.sharing == "corun":
        raise InputError(
            f"{source}sharing `corun`: the executor runs instances in turn: plan again with sharing=sequence"
        )
    for instance in plan.instances:
        if any(bucket.adapter_fusion == "bucket" for bucket in instance.buckets):
            raise InputError(
                f"{source}instance {instance.name}: adapter_fusion `bucket`: the executor launches adapters with their hTask: "
                "plan again with adapter_fusion=htask"
            )


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
