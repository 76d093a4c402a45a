"""Checkpoints to resume from: whole or not there, and of this very run.

A checkpoint is written under another name, flushed to the disk and renamed, so that one which has
its name is complete, whatever killed the process or filled the disk. The folder they lie in is
named by a fingerprint of all that decides the result; a run never resumes from another's.
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
        folder: of all runs of this name; the checkpoints lie in a folder of it.
        identity: all that decides the result.
    """

    def __init__(self, folder: Path, identity: RunIdentity) -> None:
        self._identity = identity.content()
        self.folder = folder / files.fingerprint(self._identity)
        self._siblings = folder

    def open(self) -> None:
        """Make the folder; take away what a killed process left half written; say which other runs
        left checkpoints beside, and in what they differ."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*"):
            logger.warning("removed an incomplete checkpoint path=%s", path)
            shutil.rmtree(path)
        files.write_json(self.folder / "identity.json", self._identity)
        for other in sorted(self._siblings.glob("*/identity.json")):
            if other.parent != self.folder:
                logger.warning(
                    "started afresh beside checkpoints of other settings, which can be removed:"
                    " path=%s differs_in=%s",
                    other.parent,
                    ", ".join(differences(files.read_json(other), self._identity)),
                )

    def newest(self) -> Path | None:
        """The checkpoint of the latest step; None where there is none."""
        return max(self._all(), key=_step, default=None)

    @contextmanager
    def writing(self, step: int, *, is_main: bool = True, wait: Any = None) -> Iterator[Path]:
        """A folder to write `checkpoint-<step>` in, which has its place after the block.

        Args:
            step: optimizer steps taken.
            is_main: this process makes and moves the folder; the others write into it.
            wait: a barrier between processes that share the folder; None for a single one.
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
                # A run that resumed from an older checkpoint may come by here again.
                shutil.rmtree(target, ignore_errors=True)
                written.replace(target)
        finally:
            if is_main:
                shutil.rmtree(staged, ignore_errors=True)
        wait()

    def keep_newest(self, n_kept: int) -> None:
        """Remove all but the newest so many."""
        for path in sorted(self._all(), key=_step)[:-n_kept]:
            shutil.rmtree(path)

    @property
    def n_steps_down(self) -> int:
        """How often this run had to make do with less memory."""
        path = self.folder / STEPS_DOWN
        return files.read_json(path)["n_steps_down"] if path.is_file() else 0

    def step_down(self) -> None:
        """Remember, for this start and the next ones, that memory ran out."""
        files.write_json(self.folder / STEPS_DOWN, {"n_steps_down": self.n_steps_down + 1})

    def remove(self) -> None:
        """A finished run has nothing to resume; a forced one starts over."""
        shutil.rmtree(self.folder)

    def _all(self) -> list[Path]:
        return list(self.folder.glob(f"{PREFIX}*"))


def all_steps_down(folder: Path) -> int:
    """How often the runs of this name stepped down, together."""
    return sum(files.read_json(path)["n_steps_down"] for path in folder.glob(f"*/{STEPS_DOWN}"))


def differences(
    one: Mapping[str, Any],  # untyped: another version of this workflow may have written it
    other: Mapping[str, Any],  # untyped: the same
    path: str = "",
) -> list[str]:
    """`key: value → value` of every leaf that differs."""
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
    """Wait for the disk: the new name must not stand for what is still on its way there."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
