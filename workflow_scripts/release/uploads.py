"""Uploads to the Hugging Face Hub: one commit per release, and the Hub's refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from workflow_scripts.log import StageError


def push(
    repository: str, paths: Sequence[Path], *, token: str, message: str, is_private: bool
) -> str:
    """Upload all files in one commit.

    Returns:
        The address of the commit.
    Raises:
        StageError: the Hub refuses, or cannot be reached.
    """
    api = HfApi(token=token)
    with refusals_explained(repository, token):
        api.create_repo(repository, private=is_private, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths
        ]
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)


@contextmanager
def refusals_explained(repository: str, token: str) -> Iterator[None]:
    """Turn the library's exceptions into messages without the token."""

    def found(error: Exception) -> str:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        return line.replace(token, "…")

    try:
        yield
    # ValueError: the model card's front matter. An HfHubHTTPError is an HTTPError, too.
    except (HfHubHTTPError, ValueError) as error:
        raise StageError(
            "the Hub refuses the upload",
            where=repository,
            found=found(error),
            expected="a token in HF_TOKEN with write access, and a valid model card",
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:
        raise StageError(
            "the Hub cannot be reached",
            where=repository,
            found=found(error),
            to_fix="check the connection and push again: uploaded files are not sent twice",
        ) from None
