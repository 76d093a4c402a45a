"""The Hugging Face Hub: what it refuses, said with its remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workflow_scripts import files
from workflow_scripts.log import DOCTOR, StageError

logger = logging.getLogger("hub")


class HubUnreachable(StageError):
    """No usable answer: no connection, offline mode, or a Hub out of order."""


@contextmanager
def refusals_explained(
    kind: str, repository: str, *, page: str, key: str, revision: str | None, otherwise: str
) -> Iterator[None]:
    """Turn the Hub's exceptions into messages.

    Args:
        kind: what is fetched, as a user calls it: `base model`.
        page: where a licence is accepted.
        key: of the config; it names the repository, and its neighbour `revision` the revision.
        otherwise: the remedy where mending the connection is none.
    Raises:
        StageError: gated, unknown, or unknown revision.
        HubUnreachable: everything else that a request can end with.
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{key}, {page}"
    try:
        yield
    except GatedRepoError as error:
        raise StageError(
            f"the {kind} is gated",
            where=where,
            found="access refused",
            to_fix="accept the licence on that page, then set HF_TOKEN (or run `hf auth login`);"
            f" {DOCTOR}",
        ) from error
    except RevisionNotFoundError as error:
        raise StageError(
            f"the {kind} has no such revision",
            where=f"{key.rpartition('.')[0]}.revision",
            found=revision,
            expected=f"a commit, tag or branch of {repository}",
        ) from error
    except RepositoryNotFoundError as error:
        raise StageError(
            f"the {kind} is not on the Hub, or is private",
            where=where,
            to_fix="check the spelling; for a private repository set HF_TOKEN",
        ) from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if files.is_full_disk(error):
            raise
        raise HubUnreachable(
            "the Hub cannot be reached",
            where=where,
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            to_fix=f"check the connection, or {otherwise}; {DOCTOR}",
        ) from error


def download(
    repository: str,
    revision: str | None,
    folder: Path,
    *,
    kind: str,
    key: str,
    wanted: list[str],
    unwanted: list[str] | None = None,
) -> str:
    """Files of a model repository at one commit.

    Args:
        kind: as in `refusals_explained`, as is `key`.
        wanted: patterns of the files' paths, as are `unwanted`.
    Returns:
        The commit.
    Raises:
        StageError: gated, unknown, unknown revision, or no connection; each with its remedy.
    """
    from huggingface_hub import HfApi, snapshot_download

    with refusals_explained(
        kind,
        repository,
        page=f"https://huggingface.co/{repository}",
        key=key,
        revision=revision,
        otherwise=f"download it elsewhere and set `{key.rpartition('.')[2]}` to the folder",
    ):
        commit = HfApi().model_info(repository, revision=revision).sha
        assert commit is not None  # a repository has one
        if revision != commit:
            logger.warning(
                "resolved source=%s revision=%s commit=%s: set `revision` to the commit, the only"
                " name that cannot move",
                repository,
                revision,
                commit,
            )
        snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
    return commit
