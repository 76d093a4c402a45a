"""Snakemake's `--cache`: what may be shared between working copies, and what its keys depend on.

The key of a shared file is a hash of rules, params and the content of inputs, back to the first
inputs. Nothing here logs: the Snakefile calls it before the first job.
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
    """Package → version in Snakemake's environment; None if it is only in a job's environment,
    whose definition Snakemake's key includes already."""
    return {
        name: next((found.version for found in metadata.distributions(name=name)), None)
        for name in packages
    }


@cache
def content_of(folder: Path) -> dict[str, str]:
    """File → SHA-256 of a folder's files; each folder is read once."""
    if not folder.is_dir():  # its own stage reports that
        return {}
    return {path.name: files.sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def check(config: Config, runs: Iterable[str], named: Iterable[str]) -> None:
    """Check that `--cache` can be used with this config.

    Args:
        named: the rules named after `--cache`.
    Raises:
        StageError: a rule is named; the folder for shared files is not writable; or the config does
            not fix the inputs of the runs: they are generated, on storage, or a branch on the Hub.
    """
    if named := list(named):
        # Snakemake also applies named rules on a cluster's nodes, where it knows only one job and
        # cannot hash the folders that this job reads.
        raise StageError(
            "--cache must not name rules in this workflow",
            where="the command line",
            found=", ".join(named),
            expected="--cache followed by another option; the rules define what is shared",
        )
    location = os.environ.get(LOCATION)
    if not location or not (is_url(location) or os.access(location, os.W_OK)):
        raise StageError(
            "--cache has no folder for shared files",
            where=f"the environment, {LOCATION}",
            found=location,
            expected="an existing folder that you may write to",
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
            "--cache needs inputs that cannot change, but those of a run can",
            where="models and datasets of the runs in `build`",
            found=", ".join(dict.fromkeys(found)),
            expected="commits on the Hub (40 hexadecimal digits), or files on this machine",
            to_fix="pin a commit, or start without --cache",
        )
