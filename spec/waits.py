"""waits: run instruction lists with nothing but their dependencies; what cannot finish waits in a cycle, which is named."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.spec.program import Instruction, Program, instruction_text

#: A list of instructions: (rank, which of its lists).
Place = tuple[int, int]


def deadlock_text(program: Program) -> str | None:
    """The cycle in which the lists of a Program wait for each other, in words; None where all of them finish.

    A receive waits for its send, a step for every rank of its instance (the gradient norm is summed).
    """
    waits = _Waits(program)
    while waits.sweep():
        pass
    stuck = [place for place, x in waits.lists.items() if waits.position[place] < len(x)]
    return waits.cycle_text(stuck[0]) if stuck else None


class _Waits:
    """How far each list has come; used once and thrown away."""

    def __init__(self, program: Program) -> None:
        self.lists: dict[Place, Sequence[Instruction]] = {}
        self.first: dict[Place, int] = {}
        for listing in program.ranks:
            for number, places in enumerate(listing.lists):
                self.lists[listing.rank, number] = listing.instructions[places.start : places.stop]
                self.first[listing.rank, number] = places.start
        self.position = dict.fromkeys(self.lists, 0)
        self.meetings: dict[Instruction, list[tuple[Place, int]]] = {}
        self.sender: dict[int | None, Place] = {}
        self.sent: set[int | None] = set()
        for place, instructions in self.lists.items():
            for index, x in enumerate(instructions):
                if x.op == "step":
                    self.meetings.setdefault(x, []).append((place, index))
                elif x.op == "send":
                    self.sender[x.tag] = place

    def sweep(self) -> bool:
        """Run every list as far as it goes; whether any moved."""
        before = sum(self.position.values())
        for place, instructions in self.lists.items():
            while self.position[place] < len(instructions):
                x = instructions[self.position[place]]
                if self._blocker(x) is not None:
                    break
                if x.op == "send":
                    self.sent.add(x.tag)
                self.position[place] += 1
        return sum(self.position.values()) > before

    def _blocker(self, x: Instruction) -> Place | None:
        """The list that an instruction waits for."""
        if x.op == "recv":
            return None if x.tag in self.sent else self.sender[x.tag]
        late = (place for place, index in self.meetings.get(x, ()) if self.position[place] < index)
        return next(late, None)

    def cycle_text(self, start: Place) -> str:
        """Who waits for whom, from one list of the cycle round to itself; what a stuck list waits for is stuck as well."""
        chain: list[Place] = []
        place = start
        while place not in chain:
            chain.append(place)
            found = self._blocker(self._at(place))
            assert found is not None
            place = found
        cycle = chain[chain.index(place) :]
        steps = [f"{self._name(a)} waits for rank {b[0]}" for a, b in zip(cycle, [*cycle[1:], place], strict=True)]
        return f"the order deadlocks: {', '.join(steps)}"

    def _at(self, place: Place) -> Instruction:
        return self.lists[place][self.position[place]]

    def _name(self, place: Place) -> str:
        index = self.first[place] + self.position[place]
        return f"rank {place[0]} at instruction {index} ({instruction_text(self._at(place))})"
