"""The Hugging Face Hub: what it refuses, said with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from workflow_scripts import files
from workflow_scripts.log import StageError


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
            to_fix="accept the licence on that page, then set HF_TOKEN (or run `hf auth login`)",
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
            to_fix=f"check the connection, or {otherwise}",
        ) from error
