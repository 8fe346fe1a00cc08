"""One exception tree: InputError (exit 2) for wrong input, NoAnswerError (exit 1) when the answer is no."""

from __future__ import annotations

from collections.abc import Iterable


class MuxtuneError(Exception):
    """Base of every error that muxtune raises on purpose."""

    exit_code = 1


class InputError(MuxtuneError, ValueError):
    """The input is wrong: names the file or option, the place in it, the value and the remedy."""

    exit_code = 2


class UnknownKeyError(InputError):
    """A name that no plug-in, preset or table entry has."""

    def __init__(self, kind: str, key: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {key!r}: known are {', '.join(sorted(known)) or '(none)'}")


class DuplicateKeyError(InputError):
    """Two plug-ins or entries claim one name."""


class NoAnswerError(MuxtuneError):
    """The question was understood and the answer is no."""


class InfeasibleError(NoAnswerError):
    """No plan satisfies the constraints; the message names the tightest one."""


class PlanError(NoAnswerError):
    """A Plan breaks a rule of execution; the message lists what `check` found."""


class ExtrapolationError(NoAnswerError):
    """A cost model was asked outside the range it was fitted on, and extrapolation was not allowed."""


class ExecutionError(MuxtuneError):
    """A worker process failed or disagreed with the Program it was given."""
