"""check-policy: the laws of every policy, asked of one from anywhere."""

from __future__ import annotations

from typing import Any

from muxtune.experiments.commands.inputs import Progress, silent
from muxtune.experiments.console import render, table
from muxtune.experiments.laws import ask_all, variants


def run(reference: str, progress: Progress = silent) -> dict[str, Any]:
    """Ask every law of the policy, as it is and with each of its switches thrown.

    Raises:
        InputError: no such policy, file, class or option.
    """
    asked = list(variants(reference))
    laws = ask_all(reference, lambda done, total: progress("law", done, total))
    return {"policy": reference, "variants": asked, "ok": all(law["ok"] for law in laws), "laws": laws}


def show(body: dict[str, Any]) -> str:
    """Pass or FAIL for each law, a counterexample under the table for each that fails."""
    rows = [["pass" if law["ok"] else "FAIL", law["law"], law["says"]] for law in body["laws"]]
    failed = [f"{law['law']}: {law['counterexample']}" for law in body["laws"] if not law["ok"]]
    kept = len(rows) - len(failed)
    head = f"{body['policy']}: {kept} of {len(rows)} laws hold"
    if len(body["variants"]) > 1:
        head += f", asked of {len(body['variants'])} variants"
    return render(head, table(["", "law", "what it says"], rows), *failed)
