"""Frozen runs, which are not made again: a check that the config still has their settings."""

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
    """Compare a frozen run's settings with those that its release was made with.

    Keys that a later version of the workflow added do not count. A run without a release is not
    checked.

    Args:
        run: its name.
        names: its model, dataset, packing and recipe.
        config: its settings, as `Params.release` gives them to its release.
        release: folder of the release.
    Raises:
        StageError: a setting differs, so reports would describe the run wrongly.
    """
    provenance = release / "provenance.json"
    if not provenance.is_file():
        return
    made = ReleasedRun.read(provenance)
    # The release of an earlier version may lack tables.
    tables = made.config
    shared = {"evaluation": tables.get("evaluation", {})}
    if "quantizations" in tables.get("gguf", {}):
        shared["gguf"] = {"quantizations": tables["gguf"]["quantizations"]}
    found = list(differences(shared, config))
    for field, table in RUN_TABLES.items():
        now = without_folders({"name": names.get(field), **config.get(field, {})})
        before = {"name": getattr(made, field), **tables.get(field, {})}
        found += differences(before, now, f"runs.{run}, {table}.{names.get(field)}: ")
    if found:
        key, old, new = found[0]
        raise StageError(
            f"the frozen run {run} was made with other settings",
            where=key,
            found=new,
            expected=f"{old!r}, as in {provenance}",
            to_fix="set it back; or take the run out of `frozen`, and it is made again; or give"
            " the new settings to a run with another name, which is built separately",
        )


def differences(before: Tables, now: Tables, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of each changed setting, among the keys of `before`."""
    for key, old in before.items():
        new = now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new
