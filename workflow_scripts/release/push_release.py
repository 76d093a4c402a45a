"""Upload releases to the Hugging Face Hub, or say what would be uploaded.

Each goes into a repository `owner/<run>-GGUF`, as one commit; files that are there already are not
sent again, and none is deleted. The token is taken from HF_TOKEN alone (not from a login kept on
this machine), and is written nowhere.

python -m workflow_scripts.release.push_release --releases results/runs/mistral/release
    --settings '{"owner": "me", "dry_run": false}'
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import log
from workflow_scripts.handover.provenance import ReleasedRun
from workflow_scripts.log import StageError
from workflow_scripts.release.release_folder import released_files
from workflow_scripts.settings import PushSettings, settings_from_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN_VARIABLE = "HF_TOKEN"
logger = log.stage_logger("push_release")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--releases", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--settings", required=True, help="JSON of `push`")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(PushSettings, arguments.settings)
    if settings.owner is None:
        raise StageError(
            "whose repositories the releases go to is not said",
            where="push.owner",
            expected="a user or an organization of the Hub",
        )
    token = os.environ.get(TOKEN_VARIABLE)
    if not settings.dry_run and not token:
        raise StageError(
            "there is no token to upload with",
            where=f"the environment, {TOKEN_VARIABLE}",
            expected="a token of the Hub that may write",
            to_fix="make one in the Hub's settings, and export it",
        )
    # All are checked before the first byte leaves.
    checked = {release: released_files(release) for release in arguments.releases}
    for release, paths in checked.items():
        run = ReleasedRun.read(release / "provenance.json").run
        repository = f"{settings.owner}/{run}-GGUF"
        for path in paths:
            print(f"{path.stat().st_size:>15,}  {repository}/{path.name}", flush=True)
        if settings.dry_run:
            continue
        from huggingface_hub import HfApi

        commit = push(HfApi(token=token), repository, paths, run=run, is_private=settings.private)
        logger.info("pushed n_files=%d to=%s", len(paths), commit)
    if settings.dry_run:
        print("nothing was uploaded: --config push='{dry_run: false}' uploads", flush=True)


def push(api: HfApi, repository: str, paths: Sequence[Path], *, run: str, is_private: bool) -> str:
    """One commit with all files.

    Returns:
        The commit's address.
    Raises:
        StageError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd

    with refusals_explained(repository, api.token):
        api.create_repo(repository, private=is_private, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths
        ]
        return str(
            api.create_commit(repository, operations, commit_message=f"Release of {run}").commit_url
        )


@contextmanager
def refusals_explained(repository: str, token: str | bool | None) -> Iterator[None]:
    """Turn the library's exceptions into messages without the token."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    def found(error: Exception) -> str:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        return line.replace(str(token), "…")

    try:
        yield
    # ValueError: the model card's front matter; HfHubHTTPError is an HTTPError as well.
    except (HfHubHTTPError, ValueError) as error:
        raise StageError(
            "the Hub refuses the upload",
            where=repository,
            found=found(error),
            expected=f"a token in {TOKEN_VARIABLE} that may write there, and a card the Hub reads",
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:
        raise StageError(
            "the Hub cannot be reached",
            where=repository,
            found=found(error),
            to_fix="check the connection, and push again: what was sent is not sent again",
        ) from None


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
