"""Orders inside a clock (MuxTune Algorithm 1, critical path) and the time they take: pure functions of latencies.

A compute subgraph that would take a ns alone and c ≥ a ns beside collectives works off a·c units, c of them a nanosecond
alone and a of them under a collective; its end is rounded up to a whole nanosecond. All arithmetic is on integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from muxtune.spec.noun import noun

Priority = Literal["shallow", "critical-path"]
Ties = Literal["longest", "earlier"]
#: (start, end) of collectives, in order and without overlap.
Intervals = Sequence[tuple[int, int]]


@noun
class Node:
    """A compute subgraph with the collective appended to it (§3.4.2); `collective` says whether there is one.

    `shared_ns` is the compute's time if collectives run beside all of it; below `compute_ns` counts as equal. A node of
    `adapters` is launched as one with those of other chains that follow it at the same depth: the group takes
    max{once + Σ adds, max compute}, with `once_ns` paid once and `adds_ns` by each (u_a·t_a of Eq. 3).
    """

    compute_ns: int
    collective: bool = False
    comm_ns: int = 0
    shared_ns: int = 0
    adapters: bool = False
    adds_ns: int = 0
    once_ns: int = 0


Chain = tuple[Node, ...]
#: (chain, depth) of each node in launch order.
LaunchOrder = tuple[tuple[int, int], ...]


@noun
class LaunchRule:
    """Which subgraph of a bucket is launched next.

    `shallow` is Algorithm 1: least topological depth first; among equals the `longest` compute, to hide most of what is in
    flight, or the `earlier` hTask. `critical-path`: of the subgraphs whose input is there when the compute stream is free,
    the one with most compute and collectives left in its hTask, then the earlier hTask.
    """

    priority: Priority = "shallow"
    ties: Ties = "longest"


def launch_order(chains: Sequence[Chain], rule: LaunchRule) -> LaunchOrder:
    """The order in which a rule launches the nodes of some chains."""
    return critical_path(chains) if rule.priority == "critical-path" else algorithm_1(chains, rule.ties)


def algorithm_1(chains: Sequence[Chain], ties: Ties = "longest") -> LaunchOrder:
    """Algorithm 1 (§3.4.2): shallow first, then by `ties`; what is equal still goes by the earlier chain.

    The subgraphs of an hTask form a chain, so the paper's queue of nodes without predecessors empties level by level.
    """
    sign = 1 if ties == "longest" else 0
    nodes = [(depth, -node.compute_ns * sign, c) for c, chain in enumerate(chains) for depth, node in enumerate(chain)]
    return tuple((c, depth) for depth, _, c in sorted(nodes))


def critical_path(chains: Sequence[Chain]) -> LaunchOrder:
    """List schedule by the time left in a chain; where no input is there, the chain whose input comes first."""
    clock = _Clock(len(chains))
    left_ns = [sum(n.compute_ns + n.comm_ns for n in chain) for chain in chains]
    done = [0] * len(chains)
    order: list[tuple[int, int]] = []
    while open_chains := _open_chains(chains, done):
        first_ns = max(clock.compute_free_ns, min(clock.ready_ns[c] for c in open_chains))
        chosen = min((c for c in open_chains if clock.ready_ns[c] <= first_ns), key=lambda c: (-left_ns[c], c))
        group = open_chains if chains[chosen][done[chosen]].adapters else [chosen]
        clock.run(group, group_node([chains[c][done[c]] for c in group]))
        for c in group:
            node = chains[c][done[c]]
            left_ns[c] -= node.compute_ns + node.comm_ns
            order.append((c, done[c]))
            done[c] += 1
    return tuple(order)


def _open_chains(chains: Sequence[Chain], done: Sequence[int]) -> list[int]:
    """Chains with a node that may be launched: adapters only once every chain has come to them."""
    found = [c for c, chain in enumerate(chains) if done[c] < len(chain)]
    before = [c for c in found if not chains[c][done[c]].adapters]
    return before or found


def group_node(nodes: Sequence[Node]) -> Node:
    """Adapters that are launched as one."""
    if len(nodes) == 1:
        return nodes[0]
    compute_ns = max(max(n.once_ns for n in nodes) + sum(n.adds_ns for n in nodes), *(n.compute_ns for n in nodes))
    shared_ns = max(-(-compute_ns * n.shared_ns // n.compute_ns) if n.compute_ns else 0 for n in nodes)
    return Node(compute_ns=compute_ns, shared_ns=shared_ns)


def clock_ns(chains: Sequence[Chain], order: Sequence[tuple[int, int]]) -> int:
    """Time of a clock: compute and collectives on a FIFO stream each, a chain's next node after its last collective."""
    clock = _Clock(len(chains))
    if not any(node.adapters for chain in chains for node in chain):
        for c, depth in order:
            clock.run_one(c, chains[c][depth])
        return max(clock.ready_ns)
    places = enumerate(order)
    for _, run in groupby(places, key=lambda x: (-1, x[1][1]) if chains[x[1][0]][x[1][1]].adapters else x):
        group = [place for _, place in run]
        clock.run([c for c, _ in group], group_node([chains[c][depth] for c, depth in group]))
    return max(clock.ready_ns)


class _Clock:
    """Both streams of one clock as nodes are launched; used once and thrown away.

    A collective of this clock starts after its own compute, so all that can run beside a compute were launched before it.
    """

    def __init__(self, chains: int) -> None:
        self.compute_free_ns = 0
        self.ready_ns = [0] * chains
        self.collectives: list[tuple[int, int]] = []

    def run(self, chains: Sequence[int], node: Node) -> None:
        """Launch the next node of several chains as one."""
        first, *others = sorted(chains, key=lambda c: -self.ready_ns[c])
        self.run_one(first, node)
        for c in others:
            self.ready_ns[c] = self.ready_ns[first]

    def run_one(self, chain: int, node: Node) -> None:
        """Launch the next node of a chain."""
        start_ns = max(self.compute_free_ns, self.ready_ns[chain])
        busy_ns = self.collectives[-1][1] if self.collectives else 0
        if start_ns >= busy_ns:
            end_ns = start_ns + node.compute_ns
        else:
            end_ns = slowed_end_ns(start_ns, node.compute_ns, node.shared_ns, self.collectives)
        ready_ns = self.compute_free_ns = end_ns
        if node.collective:
            begin_ns = max(end_ns, busy_ns)
            ready_ns = begin_ns + node.comm_ns
            self.collectives.append((begin_ns, ready_ns))
        self.ready_ns[chain] = ready_ns


def slowed_end_ns(start_ns: int, alone_ns: int, shared_ns: int, collectives: Intervals) -> int:
    """When a compute that starts at `start_ns` ends: `alone_ns` later without collectives, `shared_ns` later under them."""
    if shared_ns <= alone_ns or not alone_ns:
        return start_ns + alone_ns
    now_ns, left = start_ns, alone_ns * shared_ns
    for begin_ns, end_ns in _from(collectives, start_ns):
        if now_ns < begin_ns:
            gap_ns = begin_ns - now_ns
            if left <= gap_ns * shared_ns:
                break
            left -= gap_ns * shared_ns
            now_ns = begin_ns
        if left <= (end_ns - now_ns) * alone_ns:
            return now_ns - (-left // alone_ns)
        left -= (end_ns - now_ns) * alone_ns
        now_ns = end_ns
    return now_ns - (-left // shared_ns)


def _from(collectives: Intervals, start_ns: int) -> Intervals:
    """The collectives that end after a time."""
    first = len(collectives)
    while first and collectives[first - 1][1] > start_ns:
        first -= 1
    return collectives[first:]
