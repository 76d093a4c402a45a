"""Snakemake's `--cache`: what may be shared between working copies, and what tells it apart.

The key of a shared file is made of rules, params and the content of inputs, back to the first ones.
Nothing here logs: the Snakefile asks it before the first job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.settings import Config
from workflow_scripts.urls import is_url

LOCATION = "SNAKEMAKE_OUTPUT_CACHE"
COMMIT = re.compile("[0-9a-f]{40}")


@cache
def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Package → its version where Snakemake runs; None where it is only in a job's environment,
    whose definition Snakemake counts in itself."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def content_of(folder: Path) -> dict[str, str]:
    """File → SHA-256, of a folder's files; read once."""
    if not folder.is_dir():  # its own stage says so
        return {}
    return {path.name: files.sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def check(config: Config, runs: Iterable[str], named: Iterable[str]) -> None:
    """
    Args:
        named: rules after `--cache`.
    Raises:
        StageError: a rule is named; the folder for shared files cannot be written to; or what the
            runs begin with is not told by the config: made on the spot, or a branch of the Hub.
    """
    if named := list(named):
        # Named ones Snakemake also takes on a cluster's nodes, where it sees one job alone and
        # fails to hash the folders that it reads.
        raise StageError(
            "--cache takes no names of rules here",
            where="the command line",
            found=", ".join(named),
            expected="--cache alone, with another option after it: the rules say what is shared",
        )
    location = os.environ.get(LOCATION)
    if not location or not (is_url(location) or os.access(location, os.W_OK)):
        raise StageError(
            "--cache has no folder to share files in",
            where=f"the environment, {LOCATION}",
            found=location,
            expected="a folder that is there, and that you may write to",
        )
    found = []
    for name in runs:
        run = config.runs[name]
        model, dataset = config.models[run.model], config.datasets[run.dataset]
        if model.built_here:
            found.append(f"models.{run.model}.{'transplant' if model.transplant else 'generate'}")
        elif not model.is_local and not COMMIT.fullmatch(model.revision or ""):
            found.append(f"models.{run.model}.revision: {model.revision}")
        if dataset.generate:
            found.append(f"datasets.{run.dataset}.generate")
        for source in dataset.all_sources.values():
            if source.hub and not COMMIT.fullmatch(source.revision or ""):
                found.append(f"{source.hub}, revision: {source.revision}")
            found += filter(is_url, source.files or [])
        if dataset.cleaning.decontamination:
            found += filter(is_url, dataset.cleaning.decontamination.files)
    if found:
        raise StageError(
            "--cache cannot tell what a run begins with",
            where="models and datasets of the runs in `build`",
            found=", ".join(dict.fromkeys(found)),
            expected="commits of the Hub (40 hexadecimal digits), or files of this machine",
            to_fix="pin a commit; without --cache anything goes",
        )
