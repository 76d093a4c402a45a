"""Runs that are not made again: whether the config still says what they were made with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workflow_scripts.handover.provenance import ReleasedRun
from workflow_scripts.log import StageError
from workflow_scripts.release.provenance import without_folders
from workflow_scripts.settings import RUN_TABLES

Tables = Mapping[str, Any]  # untyped: tables of a config, of this version or of another


def check(run: str, names: Tables, config: Tables, release: Path) -> None:
    """Hold a frozen run's settings against those its release was made with. Keys that a later
    version of the workflow added are no difference; a run that was not released is not checked.

    Args:
        run: its name.
        names: of its model, dataset, packing and recipe.
        config: what the release would say of them (`release_json`).
        release: folder of the release.
    Raises:
        StageError: a setting is another; reports would say what is not so.
    """
    provenance = release / "provenance.json"
    if not provenance.is_file():
        return
    made = ReleasedRun.read(provenance)
    # A release of an earlier version may say less.
    tables = made.config
    shared = {"evaluation": tables.get("evaluation", {})}
    if "quantizations" in tables.get("gguf", {}):
        shared["gguf"] = {"quantizations": tables["gguf"]["quantizations"]}
    for key, old, new in differences(shared, config):
        raise _changed(run, key, old, new, provenance)
    for field, table in RUN_TABLES.items():
        now = without_folders({"name": names.get(field), **config.get(field, {})})
        before = {"name": getattr(made, field), **tables.get(field, {})}
        for key, old, new in differences(before, now):
            place = f"runs.{run}, {table}.{names.get(field)}: {key}"
            raise _changed(run, place, old, new, provenance)


def _changed(run: str, key: str, old: Any, new: Any, provenance: Path) -> StageError:
    return StageError(
        f"the frozen run {run} was made with other settings",
        where=key,
        found=new,
        expected=f"{old!r}, as in {provenance}",
        to_fix="set it back; or take the run out of `frozen`, and it is made anew; or give the new"
        " settings to a run of another name, built apart",
    )


def differences(before: Tables, now: Tables, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of what changed, of the keys that were there before."""
    for key, old in before.items():
        new = now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new
