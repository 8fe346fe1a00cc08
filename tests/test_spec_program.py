"""check of a Program by hand: tags, both ends of a channel, waits that close a ring, steps as meetings."""

from __future__ import annotations

from typing import Any

from muxtune.spec.check import check_program
from muxtune.spec.program import Instruction, Program, RankProgram, UnitKey

KEY = UnitKey(step=0, instance=0, bucket=0, unit=0)


def one(problems: tuple[str, ...]) -> str:
    (problem,) = problems
    return problem


def program(*ranks: tuple[Instruction, ...]) -> Program:
    """A Program by hand of bare instructions."""
    listed = tuple(RankProgram(rank=r, instructions=x) for r, x in enumerate(ranks))
    return Program(plan_digest="", seed=0, steps=1, ranks=listed, units=(), launches=())


def message(op: Any, peer: int, tag: int) -> Instruction:
    return Instruction(op=op, key=KEY, peer=peer, tag=tag, payload="activation", size_bytes=1)


def test_good() -> None:
    assert check_program(program((message("send", 1, 1),), (message("recv", 0, 1),))) == ()


def test_duplicate_tags() -> None:
    found = check_program(program((message("send", 1, 7),) * 2, (message("recv", 0, 7),)))
    assert found == ("two sends carry tag 7 (ranks [0, 0]): tags must be unique",)


def test_no_counterpart() -> None:
    assert check_program(program((message("send", 1, 7),), ())) == ("the send with tag 7 on rank 0 has no counterpart",)


def test_wrong_counterpart() -> None:
    found = check_program(program((message("send", 2, 7),), (message("recv", 0, 7),), ()))
    assert "tag 7: rank 0 sends with rank 2, the other end is rank 1" in found


def test_cycle_over_three_ranks() -> None:
    ring = [(message("recv", (r - 1) % 3, r), message("send", (r + 1) % 3, (r + 1) % 3)) for r in range(3)]
    assert one(check_program(program(*ring))) == (
        "the order deadlocks: rank 0 at instruction 0 (recv activation of bucket 0 unit 0) waits for rank 2, "
        "rank 2 at instruction 0 (recv activation of bucket 0 unit 0) waits for rank 1, "
        "rank 1 at instruction 0 (recv activation of bucket 0 unit 0) waits for rank 0"
    )


def test_step_is_a_meeting() -> None:
    """Rank 0 meets before it sends what rank 1 needs to come to the meeting."""
    step = Instruction(op="step", key=KEY, task="t0")
    found = check_program(program((step, message("send", 1, 1)), (message("recv", 0, 1), step)))
    assert "rank 0 at instruction 0 (step of task t0) waits for rank 1, rank 1 at" in one(found)
    assert check_program(program((message("send", 1, 1), step), (message("recv", 0, 1), step))) == ()
