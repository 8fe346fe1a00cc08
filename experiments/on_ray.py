"""The one door of Ray: cells as remote tasks, on the cluster of RAY_ADDRESS or a local one that is started and stopped here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from muxtune.experiments.spread import Work, in_worker
from muxtune.spec.errors import InputError


def require_ray() -> Any:
    """The module.

    Raises:
        InputError: it is not installed.
    """
    if find_spec("ray") is None:
        raise InputError("--engine ray: Ray is not installed: pip install 'muxtune[ray]', or leave --engine at pool")
    import ray

    return ray


def on_ray(left: Sequence[Work], jobs: int, stop: Callable[[], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The results as they come, at most `jobs` cells at a time.

    Raises:
        InputError: Ray is not installed.
    """
    ray = require_ray()
    address = os.environ.get("RAY_ADDRESS")
    where: dict[str, Any] = {"address": address} if address else {"num_cpus": jobs}
    ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(in_worker)
        waiting = list(left)
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < jobs and not stop():
                place, cell, files = waiting.pop(0)
                running[remote.remote(cell, files)] = place
            if stop():
                return
            ready, _ = ray.wait(list(running), timeout=1.0)
            for reference in ready:
                yield running.pop(reference), ray.get(reference)
    finally:
        ray.shutdown()
