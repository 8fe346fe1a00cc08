"""Figures of a Timeline: bubble, exposed communication, per-task step time, and the differences of two Timelines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from muxtune.spec.intervals import length, overlap, union
from muxtune.spec.noun import noun
from muxtune.spec.plan import Instance
from muxtune.spec.stalls import WORK, StepBegins, step_begin_ns
from muxtune.spec.timeline import Span, Timeline

#: Waiting in a recv is no work.
BUSY_OPS = WORK


def busy_ns(timeline: Timeline, rank: int) -> int:
    """Time in which a rank runs a forward, a backward or a step; what a step waits for other ranks is left out."""
    begin_ns = step_begin_ns(timeline.spans)
    return _busy_ns(timeline.instruction_spans(rank), begin_ns)


def bubble_fraction(timeline: Timeline) -> float:
    """Share of device-time outside forwards, backwards and steps: 1 − busy / (ranks · makespan)."""
    begin_ns = step_begin_ns(timeline.spans)
    ranks: dict[int, list[Span]] = {}
    for span in timeline.spans:
        if span.subgraph < 0:
            ranks.setdefault(span.rank, []).append(span)
    busy = sum(_busy_ns(spans, begin_ns) for spans in ranks.values())
    total = len(ranks) * timeline.makespan_ns
    return max(0.0, 1.0 - busy / total) if total else 0.0


def _busy_ns(spans: Iterable[Span], begin_ns: StepBegins) -> int:
    """Time of one rank's instructions that are work; instances that run at once count once."""
    work = ((begin_ns[s.key, s.tasks] if s.op == "step" else s.start_ns, s.end_ns) for s in spans if s.op in BUSY_OPS)
    return length(union((start_ns, end_ns) for start_ns, end_ns in work if end_ns > start_ns))


def exposed_comm_fraction(timeline: Timeline) -> float:
    """Share of device-time in the communication stream while the rank's compute stream is idle."""
    exposed = 0
    for rank in timeline.ranks:
        inner = [s for s in timeline.spans if s.rank == rank and s.subgraph >= 0]
        comm = union((s.start_ns, s.end_ns) for s in inner if s.stream == "comm")
        compute = union((s.start_ns, s.end_ns) for s in inner if s.stream == "compute")
        exposed += length(comm) - overlap(comm, compute)
    total = len(timeline.ranks) * timeline.makespan_ns
    return exposed / total if total else 0.0


def task_step_ns(timeline: Timeline) -> tuple[tuple[str, int], ...]:
    """(task, ns of one optimizer step): from the first span that carries the task to the end of its step, averaged over steps."""
    first, last = _task_edges(timeline)
    return tuple((t, _mean([last[k] - first[k] for k in first if k[0] == t])) for t in _tasks(first))


@noun
class TaskPace:
    """A task's step, the time from one of its steps to the next, and when in its iteration its step ends."""

    task: str
    step_ns: int
    period_ns: int
    end_ns: int


def task_paces(timeline: Timeline, instances: Sequence[Instance]) -> tuple[TaskPace, ...]:
    """Paces of all tasks, by id. The iteration of instances that share devices, directly or through others, is theirs alone."""
    first, last = _task_edges(timeline)
    found: list[TaskPace] = []
    groups = device_groups(instances)
    makespans_ns = [
        timeline.makespan_ns if len(groups) == 1 else max(at for (t, _), at in last.items() if t in group)
        for group in groups
    ]
    for task in _tasks(first):
        period_ns = next(ns for ns, group in zip(makespans_ns, groups, strict=True) if task in group) / timeline.steps
        keys = [k for k in first if k[0] == task]
        found.append(
            TaskPace(
                task=task,
                step_ns=_mean([last[k] - first[k] for k in keys]),
                period_ns=round(period_ns),
                end_ns=_mean([last[k] - k[1] * period_ns for k in keys]),
            )
        )
    return tuple(found)


def device_groups(instances: Sequence[Instance]) -> tuple[frozenset[str], ...]:
    """The tasks of instances that share devices, directly or through others."""
    groups: list[tuple[set[int], set[str]]] = []
    for instance in instances:
        devices, tasks = set(instance.devices), set(instance.tasks)
        for other in [g for g in groups if g[0] & devices]:
            groups.remove(other)
            devices |= other[0]
            tasks |= other[1]
        groups.append((devices, tasks))
    return tuple(frozenset(tasks) for _, tasks in groups)


TaskEdges = dict[tuple[str, int], int]


def _task_edges(timeline: Timeline) -> tuple[TaskEdges, TaskEdges]:
    """Start of the first and end of the last span that carries a task, by (task, step)."""
    first: TaskEdges = {}
    last: TaskEdges = {}
    for span in timeline.spans:
        for task in span.tasks:
            at = (task, span.key.step)
            first[at] = min(first.get(at, span.start_ns), span.start_ns)
            last[at] = max(last.get(at, 0), span.end_ns)
    return first, last


def _tasks(edges: TaskEdges) -> list[str]:
    return sorted({task for task, _ in edges})


def _mean(values: Sequence[float]) -> int:
    return round(sum(values) / len(values))


@noun
class CauseError:
    """Predicted against measured device-time of one cause, summed over ranks."""

    cause: str
    predicted_ns: int
    measured_ns: int


def compare_causes(predicted: Timeline, measured: Timeline, scale: float = 1.0) -> tuple[CauseError, ...]:
    """Split the error by cause: forward, backward, step, transfer and the rest (bubble). `scale` multiplies predictions."""
    rows = [_cause(predicted, measured, op, (op,), scale) for op in BUSY_OPS]
    transfer = ("recv_activation", "recv_gradient", "send_activation", "send_gradient")
    rows.append(_cause(predicted, measured, "transfer and wait", transfer, scale))
    total_p = round(scale * predicted.makespan_ns * len(predicted.ranks))
    total_m = measured.makespan_ns * len(measured.ranks)
    rest_p, rest_m = total_p - sum(r.predicted_ns for r in rows), total_m - sum(r.measured_ns for r in rows)
    return (*rows, CauseError(cause="idle", predicted_ns=rest_p, measured_ns=rest_m))


def compare_operators(predicted: Timeline, measured: Timeline, scale: float = 1.0) -> tuple[CauseError, ...]:
    """Split the error of what runs inside clocks by kind of subgraph and direction: `forward attention`, `backward mlp`, …

    `launching` is what forwards and backwards take outside their subgraphs. `scale` multiplies predictions.
    """
    sides = (_operators(predicted), _operators(measured))
    return tuple(
        CauseError(cause=name, predicted_ns=round(scale * sides[0].get(name, 0)), measured_ns=sides[1].get(name, 0))
        for name in sorted(set().union(*sides))
    )


def _operators(timeline: Timeline) -> dict[str, int]:
    """Time by kind; a layer's number is dropped from a subgraph's name."""
    wholes = {(s.rank, s.index): s for s in timeline.spans if s.subgraph < 0 and s.op in ("forward", "backward")}
    found: dict[str, int] = {}
    inside: dict[tuple[int, int], int] = {}
    for span in timeline.spans:
        place = (span.rank, span.index)
        if span.subgraph >= 0 and place in wholes:
            name = f"{wholes[place].op} {span.op.split('.', 1)[-1]}"
            found[name] = found.get(name, 0) + span.duration_ns
            inside[place] = inside.get(place, 0) + span.duration_ns
    outside = {place: max(0, whole.duration_ns - inside.get(place, 0)) for place, whole in wholes.items()}
    for op in ("forward", "backward"):
        found[f"{op} launching"] = sum(ns for place, ns in outside.items() if wholes[place].op == op)
    return found


def _cause(predicted: Timeline, measured: Timeline, name: str, ops: Sequence[str], scale: float) -> CauseError:
    def total(timeline: Timeline) -> int:
        return sum(s.duration_ns for s in timeline.spans if s.subgraph < 0 and s.op in ops)

    return CauseError(cause=name, predicted_ns=round(scale * total(predicted)), measured_ns=total(measured))


def kendall_tau_b(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's τ-b of two rankings; None where one of them is constant or there are fewer than two entries."""
    concordant = discordant = ties_first = ties_second = 0
    for i in range(len(first)):
        for j in range(i):
            a, b = first[i] - first[j], second[i] - second[j]
            ties_first += a == 0
            ties_second += b == 0
            concordant += a * b > 0
            discordant += a * b < 0
    pairs = len(first) * (len(first) - 1) // 2
    scale = ((pairs - ties_first) * (pairs - ties_second)) ** 0.5
    return (concordant - discordant) / scale if scale else None
