"""`muxtune`: runs a command and turns the user's errors into one line on standard error and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer

from muxtune.executor.torchrun import leads
from muxtune.experiments.answer import Answer
from muxtune.experiments.cli import app
from muxtune.spec.errors import InputError, MuxtuneError, NoAnswerError

#: Modules of optional installs, and the extra that brings them.
EXTRAS = {
    "torch": "exec",
    "megatron": "exec",
    "safetensors": "exec",
    "triton": "gpu",
    "ray": "ray",
    "transformers": "hf",
    "peft": "hf",
}
#: The base of every complaint about usage (typer does not export it).
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
INTERRUPTED, BROKEN_PIPE = 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors of the user become one line on standard error and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        found = typer.main.get_command(app).main(given, prog_name="muxtune", standalone_mode=False)
        return _ended(found) if isinstance(found, int) else _say(found)
    except USAGE_ERROR as error:
        path = error.ctx.command_path if error.ctx is not None else "muxtune"
        return _complain(f"{error.format_message()}{_got(given, error)} (see `{path} --help`)", InputError.exit_code)
    except MuxtuneError as error:
        if isinstance(error, NoAnswerError) and "--json" in given:
            _say(Answer(body={"feasible": False, "reason": str(error)}, show=str, as_json=True))
        return _complain(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        return _complain(f"needs {package}: pip install 'muxtune[{EXTRAS[package]}]'", InputError.exit_code)
    except KeyboardInterrupt:
        return _ended(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _complain(f"{error.filename}: {error.strerror}", InputError.exit_code)


def _say(found: Answer | str | None) -> int:
    """Print a command's answer (a study's comes as text); None is a command that has already spoken."""
    if isinstance(found, Answer):
        from muxtune.experiments.console import json_text

        text = json_text(found.body) if found.as_json else found.show(found.body)
    else:
        text = found or ""
    if leads():
        sys.stdout.write(text)
        sys.stdout.flush()
    return NoAnswerError.exit_code if isinstance(found, Answer) and not found.ok else 0


def _ended(code: int) -> int:
    return _complain("interrupted", INTERRUPTED) if code == INTERRUPTED else code


def _got(given: Sequence[str], error: Any) -> str:
    """The value that an option was given; typer's message leaves it out."""
    names = getattr(getattr(error, "param", None), "opts", ())
    return next((f", got {value!r}" for option, value in pairwise(given) if option in names), "")


def _complain(text: str, code: int) -> int:
    sys.stderr.write(f"muxtune: error: {' '.join(text.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
