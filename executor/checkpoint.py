"""Checkpoints on disk: a folder an iteration with a manifest, made whole under another name and then renamed.

DIR/iteration-00000012/{manifest.json, TASK.rankN.safetensors, +random.rankN.safetensors}; DIR/tasks/TASK/ for tasks that left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from muxtune.spec.errors import InputError
from muxtune.spec.files import read_noun, write_noun
from muxtune.spec.noun import digest, noun
from muxtune.spec.plan import Plan, Provenance

MANIFEST = "manifest.json"
TASKS = "tasks"
#: No quoted task_id begins like this.
RANDOM = "+random"
VERSION = 1
_NAME = re.compile(r"iteration-(\d{8})")
_PART = re.compile(r".*\.(part|old)-\d+")


@noun
class FileRecord:
    """One file of a checkpoint, with what must be found when it is read; `task` is empty for what belongs to the rank."""

    name: str
    task: str
    rank: int
    tp_rank: int
    tp: int
    size_bytes: int
    sha256: str


def file_name(task: str, rank: int) -> str:
    """Name of the file of a task (empty: of the rank's generators) on a rank."""
    return f"{quote(task, safe='') or RANDOM}.rank{rank}.safetensors"


@noun
class TaskSteps:
    """Optimizer steps that a task has behind it."""

    task: str
    steps: int


@noun
class Manifest:
    """What a checkpoint holds. `run_digest` is the plan that the run began with, `plan` the one that it goes on with.

    `left` are the tasks that finished or were removed, saved under `tasks/`. `digest` is over all else but provenance.
    """

    version: int = VERSION
    run_digest: str
    seed: int
    iteration: int
    plan: Plan
    done: tuple[TaskSteps, ...]
    left: tuple[TaskSteps, ...] = ()
    files: tuple[FileRecord, ...]
    provenance: Provenance = Provenance()
    digest: str = ""

    def signed(self) -> Manifest:
        """The same with its digest filled in."""
        return replace(self, digest=digest(replace(self, digest="")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint: its folder, and its manifest, against which every file was held."""

    folder: Path
    manifest: Manifest

    def paths(self, task: str, tp_rank: int) -> list[Path]:
        """Files of a task for one tensor-parallel rank, in rank order."""
        return [self.folder / f.name for f in self.manifest.files if (f.task, f.tp_rank) == (task, tp_rank)]


def iteration_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return root / f"iteration-{iteration:08d}"


def task_folder(root: Path, task: str) -> Path:
    """Where a task that left lies."""
    return root / TASKS / quote(task, safe="")


def checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints, newest first; whatever a kill left half-made is none."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: p.name, reverse=True)


#: Runs a step once for all processes that save together, and gives each its answer.
Agree = Callable[[Callable[[], Any]], Any]


def write_checkpoint(folder: Path, manifest: Callable[[Path], Manifest], agree: Agree = lambda step: step()) -> Path:
    """Make a checkpoint: `manifest` writes the tensors into the folder it is given and says what they are.

    The folder gets its name by one rename after everything in it is on disk: before that moment it does not exist. Where each
    rank calls this in a process of its own, `agree` makes one of them do what is to be done once.
    """
    part = agree(partial(_fresh_part, folder))
    found = manifest(part).signed()
    agree(partial(_publish, part, folder, found))
    return folder


def _fresh_part(folder: Path) -> Path:
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def _publish(part: Path, folder: Path, manifest: Manifest) -> None:
    for record in manifest.files:
        if not (part / record.name).is_file():
            raise InputError(f"{part}: rank {record.rank} wrote elsewhere: give a folder that every machine sees")
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    write_noun(manifest, part / MANIFEST)
    _sync(part)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(part, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune_checkpoints(root: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and what killed runs left half-made."""
    for folder in checkpoints(root)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)
    for parent in (root, root / TASKS):
        for path in parent.iterdir() if parent.is_dir() else ():
            if _PART.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and hold every file against its manifest.

    Raises:
        InputError: the file that is missing, truncated or altered.
    """
    path = folder / MANIFEST
    manifest = read_noun(Manifest, path)
    if manifest.version != VERSION:
        raise InputError(f"{path}: version = {manifest.version}: this muxtune reads version {VERSION}")
    if manifest.signed().digest != manifest.digest:
        raise InputError(f"{path}: digest = {manifest.digest}: its content has another: it was altered")
    for record in manifest.files:
        _verify(folder / record.name, record)
    return Checkpoint(folder=folder, manifest=manifest)


def _verify(path: Path, record: FileRecord) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) != record.size_bytes:
        raise InputError(f"{path}: has {len(content)} bytes, its manifest says {record.size_bytes}: it is not whole")
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise InputError(f"{path}: has another SHA-256 than its manifest says: it was altered")


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint; None where there is none at all.

    Raises:
        InputError: the newest is not whole; the last one that is whole is named, never taken in silence.
    """
    for number, folder in enumerate(checkpoints(root)):
        try:
            return read_checkpoint(folder)
        except InputError as error:
            good = _first_good(checkpoints(root)[number + 1 :])
            remedy = f"the last good one is {good}" if good else "there is no good one before it"
            raise InputError(f"{error}; {remedy}: remove {folder} and resume again") from error
    return None


def find_task(root: Path, task: str) -> Checkpoint:
    """The checkpoint that a folder is, the one of a task that left the folder's run, or the run's newest.

    Raises:
        InputError: no checkpoint, one that is not whole, or no such task in it.
    """
    found = _find(root, task)
    known = [t.task_id for t in found.manifest.plan.workload.tasks]
    if task not in known:
        raise InputError(f"{found.folder}: has no task {task!r}: it has {', '.join(known)}")
    return found


def _find(root: Path, task: str) -> Checkpoint:
    left = task_folder(root, task)
    for folder in (root, left):
        if (folder / MANIFEST).is_file():
            return read_checkpoint(folder)
    found = newest_checkpoint(root) if root.is_dir() else None
    if found is None:
        raise InputError(f"{root}: holds no checkpoint: make one with `muxtune execute PLAN --checkpoint DIR`")
    return found


def _first_good(folders: Sequence[Path]) -> Path | None:
    for folder in folders:
        try:
            return read_checkpoint(folder).folder
        except InputError:
            continue
    return None


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold a checkpoint folder for this process; the lock goes with the process, however it ends.

    Raises:
        InputError: another run holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{root}: another run writes its checkpoints here: give another folder") from error
        yield
