"""Upload releases to the Hugging Face Hub, or list what would be uploaded.

Each release becomes one commit in a repository `owner/<run>-GGUF`. Files that are there already are
not sent again, and no file is deleted. The token comes from HF_TOKEN only (not from a login on this
machine), and is never written.

python -m workflow_scripts.release.push_release --releases results/runs/mistral/release
    --settings '{"owner": "me", "dry_run": false}'
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.provenance import ReleasedRun
from workflow_scripts.log import StageError
from workflow_scripts.release.release_folder import released_files
from workflow_scripts.settings import PushSettings, settings_from_json

logger = log.stage_logger("push_release")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--releases", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--settings", required=True, help="JSON of `push`")
    arguments = parser.parse_args(argv)

    from workflow_scripts.release import uploads

    settings = settings_from_json(PushSettings, arguments.settings)
    if settings.owner is None:
        raise StageError(
            "the config does not say whose repositories the releases go to",
            where="push.owner",
            expected="a user or an organization on the Hub",
        )
    token = os.environ.get("HF_TOKEN", "")
    if not settings.dry_run and not token:
        raise StageError(
            "there is no token to upload with",
            where="the environment, HF_TOKEN",
            expected="a token of the Hub with write access",
            to_fix="create one in the Hub's settings, and export it",
        )
    # All releases are checked before the first upload.
    checked = {release: released_files(release) for release in arguments.releases}
    for release, paths in checked.items():
        run = ReleasedRun.read(release / "provenance.json").run
        repository = f"{settings.owner}/{run}-GGUF"
        for path in paths:
            print(f"{path.stat().st_size:>15,}  {repository}/{path.name}", flush=True)
        if not settings.dry_run:
            commit = uploads.push(
                repository,
                paths,
                token=token,
                message=f"Release of {run}",
                is_private=settings.private,
            )
            logger.info("pushed n_files=%d to=%s", len(paths), commit)
    if settings.dry_run:
        print("nothing was uploaded: --config push='{dry_run: false}' uploads", flush=True)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
