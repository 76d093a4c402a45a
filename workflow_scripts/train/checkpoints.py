"""Checkpoints to resume from: complete or absent, and never those of another run.

A checkpoint is written under a temporary name, flushed to the disk and renamed. One that has its
final name is complete even if the process was killed or the disk was full. The folder is named by a
fingerprint of everything that decides the result, so a run never resumes from another run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.handover.training import RunIdentity

PREFIX = "checkpoint-"  # transformers' name
STEPS_DOWN = "memory.json"
logger = log.stage_logger("checkpoints")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: checkpoints of all runs of this name; those of this run get a subfolder.
        identity: everything that decides the result.
    """

    def __init__(self, folder: Path, identity: RunIdentity) -> None:
        self._identity = identity.content()
        self.folder = folder / files.fingerprint(self._identity)
        self._siblings = folder

    def open(self) -> None:
        """Make the folder, and remove what a killed process left incomplete.

        Logs which other runs of this name have checkpoints, and which settings differ.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*"):
            logger.warning("removed an incomplete checkpoint path=%s", path)
            shutil.rmtree(path)
        files.write_json(self.folder / "identity.json", self._identity)
        for other in sorted(self._siblings.glob("*/identity.json")):
            if other.parent != self.folder:
                logger.warning(
                    "started from scratch; checkpoints of other settings can be removed:"
                    " path=%s differs_in=%s",
                    other.parent,
                    ", ".join(differences(files.read_json(other), self._identity)),
                )

    def newest(self) -> Path | None:
        """The checkpoint of the latest step; None if there is none."""
        return max(self.folder.glob(f"{PREFIX}*"), key=_step, default=None)

    @contextmanager
    def writing(self, step: int, *, is_main: bool = True, wait: Any = None) -> Iterator[Path]:
        """A folder to write `checkpoint-<step>` into; after the block it is moved into place.

        Args:
            step: optimizer steps taken.
            is_main: this process makes and moves the folder; the others write into it.
            wait: a barrier between the processes that share the folder; None for one process.
        """
        wait = wait or (lambda: None)
        staged = self.folder / ".writing"
        if is_main:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        wait()
        try:
            yield staged
            wait()
            if is_main:
                written, target = staged / f"{PREFIX}{step}", self.folder / f"{PREFIX}{step}"
                _flush(written)
                # A run resumed from an older checkpoint may have written this step before.
                shutil.rmtree(target, ignore_errors=True)
                written.replace(target)
        finally:
            if is_main:
                shutil.rmtree(staged, ignore_errors=True)
        wait()

    def keep_newest(self, n_kept: int) -> None:
        """Remove all but the newest `n_kept`."""
        for path in sorted(self.folder.glob(f"{PREFIX}*"), key=_step)[:-n_kept]:
            shutil.rmtree(path)

    @property
    def n_steps_down(self) -> int:
        """Number of times this run ran out of memory and continued with a smaller layout."""
        path = self.folder / STEPS_DOWN
        return files.read_json(path)["n_steps_down"] if path.is_file() else 0

    def step_down(self) -> None:
        """Record that memory ran out, for this start and later ones."""
        files.write_json(self.folder / STEPS_DOWN, {"n_steps_down": self.n_steps_down + 1})

    def remove(self) -> None:
        """Remove all checkpoints of the run: once finished it has nothing to resume."""
        shutil.rmtree(self.folder)


def all_steps_down(folder: Path) -> int:
    """Sum of `n_steps_down` over all runs of this name."""
    return sum(files.read_json(path)["n_steps_down"] for path in folder.glob(f"*/{STEPS_DOWN}"))


def differences(
    one: Mapping[str, Any],  # untyped: another version of this workflow may have written it
    other: Mapping[str, Any],  # untyped: the same
    path: str = "",
) -> list[str]:
    """List `key: value → value` for every leaf that differs."""
    lines = []
    for key in dict.fromkeys([*one, *other]):
        first, second = one.get(key), other.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            lines += differences(first, second, f"{path}{key}.")
        elif first != second:
            lines.append(f"{path}{key}: {_shortly(first)} → {_shortly(second)}")
    return lines


def _shortly(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}…"


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _flush(folder: Path) -> None:
    """Flush a folder to the disk, so that its final name cannot refer to unwritten data."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
