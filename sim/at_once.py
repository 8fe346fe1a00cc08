"""What lists that run at once on a device leave behind: merged memory and power, stretched clocks, time lost to each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from muxtune.sim.corun import Slowed
from muxtune.sim.priced import Priced, PricedProgram, PricedRank, RunTimes
from muxtune.spec.noun import noun
from muxtune.spec.units import NS_PER_S

#: (start, end) of each instruction of a rank.
Moments = Sequence[tuple[int, int]]


@noun
class Lost:
    """Rank time lost to neighbours on the same device: all of it, on stated defaults, and how unsure it is (one sigma)."""

    slowed_ns: int = 0
    default_ns: int = 0
    error_ns: int = 0


def in_time_order(moments: Moments) -> Iterator[tuple[int, int, bool]]:
    """(time, instruction, whether it begins or ends), of all lists of a rank; at one moment list by list.

    What one list gives back at a moment another has not yet: peaks are never understated.
    """
    for time_ns, index, late in sorted((ns, i, late) for i, pair in enumerate(moments) for late, ns in enumerate(pair)):
        yield time_ns, index, not late


def work_begins(priced: PricedProgram, times: RunTimes) -> tuple[tuple[int, ...], ...]:
    """For each instruction of each rank when its work began: a step's once all ranks have reached it, all else at its start."""
    met: dict[int, int] = {}
    for listing, moments in zip(priced.ranks, times, strict=True):
        for x, (start_ns, _) in zip(listing.instructions, moments, strict=True):
            if x.op == "step":
                met[x.meeting] = max(start_ns, met.get(x.meeting, start_ns))
    return tuple(
        tuple(
            met[x.meeting] if x.op == "step" else start_ns
            for x, (start_ns, _) in zip(listing.instructions, moments, strict=True)
        )
        for listing, moments in zip(priced.ranks, times, strict=True)
    )


def stretched(offset_ns: int, x: Priced, moment: tuple[int, int]) -> int:
    """Where a moment inside a clock lies, `offset_ns` after its start when alone: a slowed clock is stretched evenly."""
    start_ns, end_ns = moment
    return start_ns + (offset_ns * (end_ns - start_ns) // x.duration_ns if x.duration_ns else 0)


def power_of_lists(
    listing: PricedRank, begins_ns: Iterable[int], moments: Moments, idle_w: float
) -> Iterator[tuple[int, float]]:
    """(time, watts) of a rank: idle, and every running instruction's joules spread over its own time."""
    changes: dict[int, float] = {0: 0.0}
    for x, begin_ns, (_, end_ns) in zip(listing.instructions, begins_ns, moments, strict=True):
        if x.joules and end_ns > begin_ns:
            watts = x.joules * NS_PER_S / (end_ns - begin_ns)
            changes[begin_ns] = changes.get(begin_ns, 0.0) + watts
            changes[end_ns] = changes.get(end_ns, 0.0) - watts
    now_w = 0.0
    for time_ns, change_w in sorted(changes.items()):
        now_w += change_w
        yield time_ns, idle_w + max(0.0, now_w)


def lost(priced: PricedProgram, times: RunTimes) -> Lost:
    """What the instructions of a Program lost to others on their device; nothing where lists do not run at once."""
    slowed_ns = default_ns = error_ns = 0.0
    begins = work_begins(priced, times) if priced.beside else ()
    for listing, begin_ns, moments in zip(priced.ranks, begins, times, strict=bool(begins)):
        works = [(b, end, x) for b, (_, end), x in zip(begin_ns, moments, listing.instructions, strict=True) if x.load]
        for elapsed_ns, x, found in _together(priced, works):
            assert x.load is not None
            more_ns = found.duration_ns - x.load.duration_ns
            slowed_ns += elapsed_ns * more_ns / found.duration_ns
            default_ns += elapsed_ns * found.default_ns / found.duration_ns
            error_ns += elapsed_ns * found.error_ns / found.duration_ns
    return Lost(slowed_ns=round(slowed_ns), default_ns=round(default_ns), error_ns=round(error_ns))


def _together(priced: PricedProgram, works: Sequence[tuple[int, int, Priced]]) -> Iterator[tuple[int, Priced, Slowed]]:
    """(how long, which work, its slowdown) between any two moments at which a work of a rank begins or ends."""
    assert priced.beside is not None
    edges = sorted({ns for begin_ns, end_ns, _ in works for ns in (begin_ns, end_ns)})
    waiting = sorted(range(len(works)), key=lambda i: works[i][0], reverse=True)
    running: list[int] = []
    for now_ns, then_ns in pairwise(edges):
        while waiting and works[waiting[-1]][0] <= now_ns:
            running.append(waiting.pop())
        running = [i for i in running if works[i][1] > now_ns]
        for i in running if len(running) > 1 else ():
            loads = tuple(load for j in sorted(running) if j != i and (load := works[j][2].load))
            own = works[i][2].load
            assert own is not None
            yield then_ns - now_ns, works[i][2], priced.beside.slowed(own, loads)
