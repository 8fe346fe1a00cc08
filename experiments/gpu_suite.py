"""Everything worth measuring on one GPU, in one command: `python -m muxtune.experiments.gpu_suite --budget 9m --out DIR`.

Steps are independent and ordered by value. Each writes its result at once; one that fails is reported and the others go on.
`--device cpu` runs all of it on tiny shapes, to show that it works; no figure of that is one of a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from muxtune.experiments import gpu_corun, gpu_kernels, gpu_operators
from muxtune.experiments.commands.profile import parse_budget
from muxtune.experiments.console import json_text
from muxtune.experiments.gpu_context import Context, Scale, full_scale, tiny_scale
from muxtune.experiments.gpu_head_to_head import head_to_head, large_batch, memory, sweep
from muxtune.experiments.gpu_layer_spec import transformer_engine
from muxtune.experiments.gpu_targets import judge, spoken
from muxtune.profiler.clocks import Sensors
from muxtune.profiler.provenance import birth
from muxtune.spec.errors import InputError, MuxtuneError, NoAnswerError
from muxtune.spec.files import write_text
from muxtune.spec.noun import plain

Step = Callable[[Context], dict[str, Any]]

#: By value: what would be missed most comes first.
STEPS: dict[str, Step] = {
    "kernel correctness": gpu_kernels.correctness,
    "head to head": head_to_head,
    "memory": memory,
    "operators": gpu_operators.operators,
    "co-run": gpu_corun.co_run,
    "kernel benchmark": gpu_kernels.benchmark,
    "large batch": large_batch,
    "transformer engine": transformer_engine,
    "sweep": sweep,
}
RESULTS, SUMMARY = "results.json", "summary.md"


class Suite:
    """One run: results so far in memory and on disk."""

    def __init__(self, context: Context, say: Callable[[str], None]) -> None:
        self.context, self.say = context, say
        self.steps: list[dict[str, Any]] = []
        self.sensors = Sensors(context.device)
        context.save = self.write

    def run(self, steps: dict[str, Step]) -> dict[str, Any]:
        """Run every step that the budget still reaches."""
        for name, step in steps.items():
            entry: dict[str, Any] = {"step": name, "state": "running", "result": {}}
            self.steps.append(entry)
            self.context.current = entry["result"]
            self.say(f"{name}: {self.context.left_s:.0f} s left")
            entry |= self._outcome(step)
            self.write()
            self.say(f"{name}: {entry['state']} after {entry['seconds']:.1f} s {entry['reason']}".rstrip())
        body = self.body()
        for line in spoken(body["targets"]):
            self.say(line)
        return body

    def _outcome(self, step: Step) -> dict[str, Any]:
        """State, reason and seconds of a step; whatever it raises is said and stays its own."""
        started_s, before = time.monotonic(), self.sensors.read()
        state, reason = "done", ""
        if self.context.left_s <= 0:
            return {"state": "skipped", "reason": "the budget ended", "seconds": 0.0}
        try:
            self.context.current.update(step(self.context))
        except NoAnswerError as error:
            state, reason = "not measurable here", str(error)
        except Exception as error:  # one step's failure must not cost the others
            state, reason = "failed", f"{type(error).__name__}: {error}"
            if not isinstance(error, MuxtuneError):
                self.context.current["traceback"] = traceback.format_exc(limit=-4)
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = time.monotonic() - started_s
        return {"state": state, "reason": reason, "seconds": seconds, "sensors": self.sensors.since(before)}

    def body(self) -> dict[str, Any]:
        """Everything known so far."""
        results = {s["step"]: s["result"] for s in self.steps}
        return {
            "device": self.context.device_name,
            "measured": self.context.device.type == "cuda",
            "provenance": plain(birth(self.context.device_name if self.context.device.type == "cuda" else "cpu")),
            "targets": judge(results, self.context.device.type == "cuda"),
            "steps": self.steps,
        }

    def write(self) -> None:
        """results.json and summary.md, each whole or not at all."""
        body = self.body()
        write_text(self.context.out / RESULTS, json_text(body))
        lines = [f"# GPU suite on {body['device']}", ""]
        lines += ["Tiny shapes on a CPU: no figure here is one of a GPU.", ""] if not body["measured"] else []
        lines += ["| step | state | seconds | |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {s['step']} | {s['state']} | {s.get('seconds', 0):.1f} | {s.get('reason', '')} |" for s in self.steps
        ]
        write_text(self.context.out / SUMMARY, "\n".join([*lines, "", *spoken(body["targets"]), ""]))


def run_suite(
    device: str,
    out: Path,
    budget_s: float = 540.0,
    scale: Scale | None = None,
    steps: dict[str, Step] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the suite and return what results.json holds.

    Raises:
        InputError: `device` is not here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is here: use --device cpu, which shows that the suite works")
    chosen = scale or (full_scale() if device == "cuda" else tiny_scale())
    out.mkdir(parents=True, exist_ok=True)
    context = Context(torch.device(device), out, chosen, time.monotonic() + budget_s)
    before = torch.is_grad_enabled(), torch.get_num_threads()
    torch.set_grad_enabled(False)
    if device == "cpu":
        torch.set_num_threads(1)  # as worker processes do
    try:
        return Suite(context, say).run(STEPS if steps is None else steps)
    finally:
        torch.set_grad_enabled(before[0])
        torch.set_num_threads(before[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="python -m muxtune.experiments.gpu_suite", description=__doc__)
    parser.add_argument("--budget", default="9m", help="time for everything, as 90s, 9m (default 9m)")
    parser.add_argument("--out", type=Path, required=True, help="folder for at most 8 files")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to show that it works"
    )
    options = parser.parse_args(arguments)
    try:
        budget_s = parse_budget(options.budget) or 540.0
        body = run_suite(options.device, options.out, budget_s, say=lambda line: print(line, flush=True))  # noqa: T201
    except InputError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 1 if any(s["state"] == "failed" for s in body["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
