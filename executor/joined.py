"""JoinedGroup: ranks that torchrun started; every process sends the same messages and answers for its own rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from muxtune.executor import messages
from muxtune.executor.group import DETERMINISTIC_ENVIRONMENT, WorkerGroup
from muxtune.executor.layer_spec import VARIABLE
from muxtune.executor.torchrun import torchrun_rank
from muxtune.spec.errors import InputError


class JoinedGroup(WorkerGroup):
    """This process's rank, and the answers of all. An error ends the process, and torchrun the others."""

    def __init__(
        self, ranks: int, device: Literal["cpu", "cuda"] = "cpu", timeout_s: float = 120.0, deterministic: bool = False
    ) -> None:
        from muxtune.executor.worker import Worker  # noqa: PLC0415  # Megatron: who starts workers need not wait for it

        world = int(os.environ["WORLD_SIZE"])
        if world != ranks:
            raise InputError(
                f"torchrun started {world} processes, the plan has {ranks} ranks: use --nproc-per-node {ranks}"
            )
        self.ranks = ranks
        cores = sorted(os.sched_getaffinity(0))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.worker = Worker(
            messages.Hello(
                rank=torchrun_rank() or 0,
                ranks=ranks,
                device=device,
                rendezvous="env://",
                core=cores[local % len(cores)] if device == "cpu" else -1,
                timeout_s=timeout_s,
                deterministic=deterministic,
            )
        )

    def ask(self, message: Any) -> list[Any]:
        """Answer a message as this rank and return the answers of all ranks, in rank order."""
        answer = self.worker.answers[type(message)](message)
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, answer)
        return found

    def agree(self, step: Callable[[], Any]) -> Any:
        """Rank 0 runs the step and every rank gets its answer, after which it is done for all."""
        found = [step() if self.worker.hello.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


def open_group(
    ranks: int, device: Literal["cpu", "cuda"] = "cpu", deterministic: bool = False, layer_spec: str = "auto"
) -> WorkerGroup:
    """The ranks that torchrun started, if it started this process; otherwise new worker processes.

    Raises:
        InputError: torchrun started another number of ranks.
    """
    if torchrun_rank() is None:
        return WorkerGroup(ranks, device, deterministic=deterministic, environment={VARIABLE: layer_spec})
    os.environ[VARIABLE] = layer_spec  # read when Megatron is imported
    if deterministic:
        os.environ |= DETERMINISTIC_ENVIRONMENT
    return JoinedGroup(ranks, device, deterministic=deterministic)
