"""The Hub: can it be reached, may the config's repositories be read, and how large are they?

Downloads no more than each base model's config.json.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import filter_repo_objects

from workflow_scripts import hub
from workflow_scripts.doctor.finding import Finding, Status, of_error
from workflow_scripts.doctor.requirements import Repository, Wanted, weight_bytes
from workflow_scripts.hub import HubUnreachable
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint_files import read_shape
from workflow_scripts.models.fetch_base_model import UNWANTED, WANTED

SECONDS = 5
FETCH_ELSEWHERE = (
    "unset HF_HUB_OFFLINE, or fetch it on another machine and name the folder (`source: ./folder`)"
)


def findings(wanted: Wanted) -> Iterator[Finding]:
    """Check every repository that is still to be fetched, up to the first without an answer.

    Adds the shapes and sizes of base models to `wanted`.
    """
    repositories = wanted.repositories
    if not repositories:
        yield Finding("Hub", "ok", "not asked: nothing needs to be fetched from it")
        return
    cache = Path(constants.HF_HOME).expanduser()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        found = f"{cache} cannot be written"
        yield Finding("Hub's cache", "missing", found, "a folder of yours", "set HF_HOME to one")
        return
    if constants.HF_HUB_OFFLINE:
        yield from _offline(repositories)
        return
    token = "a token is set" if huggingface_hub.get_token() else "no token"
    for number, repository in enumerate(repositories, start=1):
        name = f"Hub, {repository.name}"
        try:
            size = _ask(repository, wanted)
        except StageError as error:
            finding = of_error(name, error)
            yield finding
            if isinstance(error, HubUnreachable):
                if rest := len(repositories) - number:
                    yield Finding("Hub", "missing", f"{rest} more not asked", None, finding.to_fix)
                return
        else:
            volume = f", {size / 1e9:.1f} GB" if size else ""
            yield Finding(name, "ok", f"may be read{volume}; {token}")


def _offline(repositories: Sequence[Repository]) -> Iterator[Finding]:
    """A dataset may be in the cache of an earlier run; models are not looked for there."""
    datasets = [one.name for one in repositories if one.kind == "dataset"]
    models = [one.name for one in repositories if one.kind != "dataset"]
    kinds: tuple[tuple[Status, list[str], str], ...] = (
        ("missing", models, ""),
        ("warning", datasets, ", unless the cache has it"),
    )
    for status, names, unless in kinds:
        if names:
            found = f"HF_HUB_OFFLINE is set; to be fetched: {', '.join(names)}{unless}"
            yield Finding("Hub", status, found, None, FETCH_ELSEWHERE)


def _ask(repository: Repository, wanted: Wanted) -> int:
    """Bytes that a repository's download takes; 0 if that is not known.

    Raises:
        StageError: gated, unknown, unknown revision; `HubUnreachable`.
    """
    kind = "dataset" if repository.kind == "dataset" else "model"
    folder = "datasets/" if kind == "dataset" else ""
    name, model = repository.name, repository.model
    with (
        tempfile.TemporaryDirectory() as checkpoint,
        hub.refusals_explained(
            repository.kind,
            name,
            page=f"https://huggingface.co/{folder}{name}",
            key=repository.key,
            revision=repository.revision,
            otherwise="fetch it on another machine and name the folder",
        ),
    ):
        published = HfApi().repo_info(
            name,
            repo_type=kind,
            revision=repository.revision,
            files_metadata=True,
            timeout=SECONDS,
        )
        # Anyone may read about a gated repository; only its files are refused.
        if published.gated:
            HfApi().auth_check(name, repo_type=kind)
        if model is None:
            return 0
        huggingface_hub.hf_hub_download(
            name,
            "config.json",
            revision=published.sha,
            local_dir=checkpoint,
            etag_timeout=SECONDS,
        )
        wanted.shapes[model] = read_shape(
            Path(checkpoint), wanted.config.models[model].rope_scaling
        )
    fetched = filter_repo_objects(
        getattr(published, "siblings", None) or (),
        allow_patterns=WANTED,
        ignore_patterns=UNWANTED,
        key=lambda file: file.rfilename,
    )
    sizes = {file.rfilename: file.size for file in fetched if file.size is not None}
    if sizes:
        wanted.weight_bytes[model] = weight_bytes(sizes)
    wanted.download_bytes[model] = sum(sizes.values())
    return wanted.download_bytes[model]
