"""Moves of the search: each turns a candidate into a neighbour, drawn from a seeded generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from muxtune.policies.candidates import ORDERS, Candidate, HTaskIds
from muxtune.spec.align import LEAST_CHUNK_TOKENS, Alignment
from muxtune.spec.layout import LayoutChoice
from muxtune.spec.noun import noun
from muxtune.spec.task import Workload

#: Buckets → hTasks → tasks, while a move works on them.
Lists = list[list[HTaskIds]]
Draw = Callable[[int], int]


@noun
class Freedom:
    """What moves may change beside partition, buckets and order."""

    choices: tuple[LayoutChoice, ...]
    alignments: tuple[Alignment, ...]
    chunk_tokens: tuple[int, ...]


def chunk_sizes(workload: Workload) -> tuple[int, ...]:
    """0 (the paper's rule for each hTask) and the powers of two from the paper's least chunk to the longest billed length."""
    longest = max(t.billed_len_tokens for t in workload.tasks)
    return (0, *(LEAST_CHUNK_TOKENS << k for k in range(max(0, (longest // LEAST_CHUNK_TOKENS).bit_length()))))


def neighbour(candidate: Candidate, freedom: Freedom, rng: np.random.Generator) -> Candidate:
    """A random neighbour (canonical; possibly the candidate itself, where a move finds nothing to move)."""

    def draw(count: int) -> int:
        return int(rng.integers(count))

    kinds = draw(16)
    if kinds == 0:
        return replace(candidate, order=ORDERS[draw(len(ORDERS))])
    if kinds == 1 and len(freedom.alignments) > 1:
        return _realigned(candidate, freedom.alignments[draw(len(freedom.alignments))], 0)
    if kinds == 4 and candidate.alignment == "chunk":
        return _realigned(candidate, "chunk", freedom.chunk_tokens[draw(len(freedom.chunk_tokens))])
    if kinds in (2, 3) and len(freedom.choices) > 1:
        return replace(candidate, choice=_near(candidate.choice, freedom.choices, draw))
    lists: Lists = [list(bucket) for bucket in candidate.buckets]
    MOVES[draw(len(MOVES))](lists, draw)
    buckets = tuple(tuple(h for h in bucket if h) for bucket in lists)
    return replace(candidate, buckets=tuple(b for b in buckets if b)).canonical()


def _realigned(candidate: Candidate, alignment: Alignment, chunk_tokens: int) -> Candidate:
    return replace(candidate, alignment=alignment, chunk_tokens=chunk_tokens)


def _near(choice: LayoutChoice, choices: Sequence[LayoutChoice], draw: Draw) -> LayoutChoice:
    """Half of the time another C under the same layout, else any choice."""
    same = [c for c in choices if c.layout == choice.layout and c != choice]
    return same[draw(len(same))] if same and draw(2) else choices[draw(len(choices))]


def _move_task(lists: Lists, draw: Draw) -> None:
    """A task joins another hTask, or becomes one in a bucket of its own."""
    b, h = _pick(lists, draw)
    task = lists[b][h][draw(len(lists[b][h]))]
    lists[b][h] = tuple(x for x in lists[b][h] if x != task)
    targets = [p for p in _places(lists) if p != (b, h)]
    chosen = draw(len(targets) + 1)
    if chosen < len(targets):
        to, into = targets[chosen]
        lists[to][into] = (*lists[to][into], task)
    else:
        lists.insert(draw(len(lists) + 1), [(task,)])


def _swap_tasks(lists: Lists, draw: Draw) -> None:
    """Two tasks of different hTasks change places."""
    places = _places(lists)
    if len(places) < 2:
        return
    first = places.pop(draw(len(places)))
    second = places[draw(len(places))]
    (a, g), (b, h) = first, second
    x, y = lists[a][g][draw(len(lists[a][g]))], lists[b][h][draw(len(lists[b][h]))]
    lists[a][g] = tuple(y if t == x else t for t in lists[a][g])
    lists[b][h] = tuple(x if t == y else t for t in lists[b][h])


def _merge_htasks(lists: Lists, draw: Draw) -> None:
    """Two hTasks become one, where the first stands."""
    places = _places(lists)
    if len(places) < 2:
        return
    a, g = places.pop(draw(len(places)))
    b, h = places[draw(len(places))]
    lists[a][g] += lists[b][h]
    lists[b][h] = ()


def _split_htask(lists: Lists, draw: Draw) -> None:
    """An hTask is cut in two; the second half stays in the bucket or opens the next one."""
    large = [(b, h) for b, h in _places(lists) if len(lists[b][h]) > 1]
    if not large:
        return
    b, h = large[draw(len(large))]
    tasks = list(lists[b][h])
    taken = [tasks.pop(draw(len(tasks))) for _ in range(1 + draw(len(tasks) - 1))]
    lists[b][h] = tuple(tasks)
    if draw(2):
        lists[b].append(tuple(taken))
    else:
        lists.insert(b + 1, [tuple(taken)])


def _move_htask(lists: Lists, draw: Draw) -> None:
    """An hTask goes to another bucket, or into one of its own somewhere in the order."""
    b, h = _pick(lists, draw)
    moved, lists[b][h] = lists[b][h], ()
    chosen = draw(2 * len(lists) + 1)
    if chosen < len(lists):
        lists[chosen].append(moved)
    else:
        lists.insert(chosen - len(lists), [moved])


def _move_bucket(lists: Lists, draw: Draw) -> None:
    """A bucket takes another place in the order."""
    lists.insert(draw(len(lists)), lists.pop(draw(len(lists))))


def _merge_buckets(lists: Lists, draw: Draw) -> None:
    """Two buckets become one."""
    if len(lists) > 1:
        gone = lists.pop(draw(len(lists)))
        lists[draw(len(lists))] += gone


#: A task moves twice as often as any of the others.
MOVES: tuple[Callable[[Lists, Draw], None], ...] = (
    *(_move_task, _move_task, _swap_tasks, _merge_htasks, _split_htask),
    *(_move_htask, _move_bucket, _merge_buckets),
)


def _places(lists: Lists) -> list[tuple[int, int]]:
    return [(b, h) for b, bucket in enumerate(lists) for h in range(len(bucket))]


def _pick(lists: Lists, draw: Draw) -> tuple[int, int]:
    places = _places(lists)
    return places[draw(len(places))]
