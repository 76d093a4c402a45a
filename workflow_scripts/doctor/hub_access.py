"""The Hub: is it reached, is it allowed, may the config's repositories be read, how large are they?

Little is asked: what a repository is, and its config.json.
"""

from __future__ import annotations

import fnmatch
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from workflow_scripts.doctor.finding import Finding, Status, of_error
from workflow_scripts.doctor.requirements import Repository, Wanted, weight_bytes

SECONDS = 5
FETCH_ELSEWHERE = (
    "unset HF_HUB_OFFLINE, or fetch it on another machine and name the folder (`source: ./folder`)"
)


def findings(wanted: Wanted) -> Iterator[Finding]:
    """Every repository that is still to be fetched; the first that gets no answer ends it.

    What is learned of base models goes into `wanted`.
    """
    import huggingface_hub
    from huggingface_hub import constants

    from workflow_scripts.hub import HubUnreachable
    from workflow_scripts.log import StageError

    repositories = wanted.repositories
    if not repositories:
        yield Finding("Hub", "ok", "not asked: nothing is to be fetched from it")
        return
    cache = Path(constants.HF_HOME).expanduser()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        yield Finding(
            "Hub's cache",
            "missing",
            f"{cache} cannot be written",
            "a folder of yours",
            "set HF_HOME to one",
        )
        return
    token = "a token is set" if huggingface_hub.get_token() else "no token"
    if constants.HF_HUB_OFFLINE:
        yield from _offline(repositories)
        return
    for number, repository in enumerate(repositories):
        name = f"Hub, {repository.name}"
        try:
            size = _ask(repository, wanted)
        except HubUnreachable as error:
            rest = len(repositories) - number - 1
            finding = of_error(name, error)
            yield finding
            if rest:
                yield Finding("Hub", "missing", f"{rest} more not asked", None, finding.to_fix)
            return
        except StageError as error:
            yield of_error(name, error)
            continue
        volume = f", {size / 1e9:.1f} GB" if size else ""
        yield Finding(name, "ok", f"may be read{volume}; {token}")


def _offline(repositories: Sequence[Repository]) -> Iterator[Finding]:
    """A dataset may be in the cache of an earlier run; a model would not be looked for there."""
    datasets = [one.name for one in repositories if one.kind == "dataset"]
    models = [one.name for one in repositories if one.kind != "dataset"]
    status: Status
    for status, names in (("missing", models), ("warning", datasets)):
        if names:
            found = f"HF_HUB_OFFLINE is set; to be fetched: {', '.join(names)}"
            if status == "warning":
                found += ", unless the cache has it"
            yield Finding("Hub", status, found, None, FETCH_ELSEWHERE)


def _ask(repository: Repository, wanted: Wanted) -> int:
    """What is to be fetched, bytes; 0 where that is not known.

    Raises:
        StageError: gated, unknown, unknown revision; `HubUnreachable`.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    from workflow_scripts import hub

    kind = "dataset" if repository.kind == "dataset" else "model"
    folder = "datasets/" if kind == "dataset" else ""
    with hub.refusals_explained(
        repository.kind,
        repository.name,
        page=f"https://huggingface.co/{folder}{repository.name}",
        key=repository.key,
        revision=repository.revision,
        otherwise="fetch it on another machine and name the folder",
    ):
        published = HfApi().repo_info(
            repository.name,
            repo_type=kind,
            revision=repository.revision,
            files_metadata=True,
            timeout=SECONDS,
        )

        def get(path: str) -> bytes:
            answer = get_session().get(
                f"{constants.ENDPOINT}/{path}",
                headers=build_hf_headers(),
                timeout=SECONDS,
                follow_redirects=True,
            )
            hf_raise_for_status(answer)
            return answer.content

        # Anyone may read about a gated repository; its files are what is refused.
        if published.gated:
            get(f"api/{kind}s/{repository.name}/auth-check")
        if repository.model is None:
            return 0
        description = get(f"{repository.name}/resolve/{published.sha}/config.json")
    sizes = _wanted_sizes(
        {file.rfilename: file.size for file in getattr(published, "siblings", None) or ()}
    )
    _learn(repository.model, description, sizes, wanted)
    return sum(sizes.values())


def _wanted_sizes(sizes: dict[str, int | None]) -> dict[str, int]:
    """Of the files that fetch_base_model takes."""
    from workflow_scripts.models.fetch_base_model import UNWANTED, WANTED

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return {
        name: size
        for name, size in sizes.items()
        if size is not None and matches(name, WANTED) and not matches(name, UNWANTED)
    }


def _learn(model: str, description: bytes, sizes: dict[str, int], wanted: Wanted) -> None:
    from workflow_scripts.models.checkpoint_files import read_shape

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_bytes(description)
        wanted.shapes[model] = read_shape(Path(name), wanted.config.models[model].rope_scaling)
    if sizes:
        wanted.weight_bytes[model] = weight_bytes(sizes)
    wanted.download_bytes[model] = sum(sizes.values())
