"""Runs inside two workers: times point-to-point messages and the meeting of ranks, by the machine's common clock."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from muxtune.executor.reference import reference_ns
from muxtune.executor.worker import Worker


def transfer_round(worker: Worker, sizes_bytes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(start of send, end of send, message there, end of receive) by the common clock for each size; zeros where not known.

    Rank 0 sends, rank 1 has posted its receive and waits; then once more with the message already there. Others only meet.
    """
    rows: list[tuple[int, int, int, int]] = []
    group, barrier = worker.groups["activation"], worker.groups["instance"]
    clock = time.perf_counter_ns
    for size_bytes in sizes_bytes:
        message = torch.zeros(size_bytes // 4)
        for late in (False, True):
            if worker.hello.rank == 0:
                dist.barrier(group=barrier)
                time.sleep(0.0005)
                start_ns = clock()
                work = dist.isend(message, dst=1, group=group, tag=1)
                end_ns = clock()
                work.wait()
                rows.append((start_ns, end_ns, 0, 0))
            elif worker.hello.rank > 1:
                dist.barrier(group=barrier)
            else:
                work = dist.irecv(message, src=0, group=group, tag=1)
                dist.barrier(group=barrier)
                if late:
                    time.sleep(0.005 + size_bytes / 1e9)
                start_ns = clock()
                work.wait()
                rows.append((start_ns, 0, 0, clock()))
            dist.barrier(group=barrier)
    return rows


def meeting_round(worker: Worker, count: int) -> list[int]:
    """Durations of a 4-byte all_reduce over the instance's ranks, entered after some compute, as after an optimizer step."""
    group, value, times = worker.groups["instance"], torch.zeros(()), []
    for _ in range(count):
        dist.barrier(group=group)
        reference_ns()  # meanwhile the communication threads fall asleep
        start_ns = time.perf_counter_ns()
        dist.all_reduce(value, group=group)
        times.append(time.perf_counter_ns() - start_ns)
    return times
