"""Downloads from the Hugging Face Hub; each refusal becomes a message with its remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from workflow_scripts import files
from workflow_scripts.log import DOCTOR, StageError

logger = logging.getLogger("hub")


class HubUnreachable(StageError):
    """The Hub gives no usable answer: no connection, offline mode, or a failure of the Hub."""


@contextmanager
def refusals_explained(
    kind: str, repository: str, *, page: str, key: str, revision: str | None, otherwise: str
) -> Iterator[None]:
    """Turn the Hub's exceptions into messages.

    Args:
        kind: what is downloaded, in the user's words: `base model`.
        page: web page on which the user accepts the licence.
        key: config key of the repository; `revision` in the same table is its revision.
        otherwise: remedy for a machine without a connection.
    Raises:
        StageError: the repository is gated or unknown, or has no such revision.
        HubUnreachable: any other failure of a request.
    """
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
    """Download files of a model repository at one commit.

    Args:
        kind, key: as in `refusals_explained`.
        wanted, unwanted: patterns of the files' paths.
    Returns:
        The commit.
    Raises:
        StageError: as `refusals_explained`.
    """
    with refusals_explained(
        kind,
        repository,
        page=f"https://huggingface.co/{repository}",
        key=key,
        revision=revision,
        otherwise=f"download it elsewhere and set `{key.rpartition('.')[2]}` to the folder",
    ):
        commit = HfApi().model_info(repository, revision=revision).sha
        assert commit is not None
        if revision != commit:
            logger.warning(
                "resolved source=%s revision=%s commit=%s: set `revision` to the commit;"
                " a branch or tag can move",
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
