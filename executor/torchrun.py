"""Whether torchrun started this process, and as which rank: then every rank runs the same command, and rank 0 speaks."""

from __future__ import annotations

import os


def torchrun_rank() -> int | None:
    """This process's rank among those that torchrun started; None where nobody did."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def leads() -> bool:
    """Whether this process prints and writes files."""
    return torchrun_rank() in (None, 0)
