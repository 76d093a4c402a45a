"""Bring a base model into the workflow: from the Hugging Face Hub, or from a local folder by links.

A Hub download goes straight to its place; what was fetched (repository and resolved commit) is
written beside it as `source.json`. Set HF_TOKEN for gated repositories, HF_HUB_CACHE and
HF_ENDPOINT as usual.

python -m workflow_scripts.models.fetch_base_model
    --settings '{"source": "mistralai/Mistral-7B-v0.3"}' --checkpoint results/models/m/checkpoint
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, hub, log
from workflow_scripts.handover.origin import Origin
from workflow_scripts.log import StageError
from workflow_scripts.models import checkpoint as checkpoints, tokenizer_files
from workflow_scripts.settings import ModelSettings, settings_from_json

OUTPUT_VERSION = 1
# Weights as transformers reads them; the same again in `consolidated*` or .bin would double the
# download.
WANTED = ["*.json", "model*.safetensors", "tokenizer.model*", "LICENSE*", "*.jinja"]
UNWANTED = ["consolidated*", "*/*"]
logger = log.stage_logger("fetch_base_model")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `models.<name>`")
    parser.add_argument("--checkpoint", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(ModelSettings, arguments.settings)
    if settings.source is None:
        raise StageError("no model to fetch", where="--settings, source", found=settings.source)

    with files.atomic_folder(arguments.checkpoint) as folder:
        judged = folder
        if settings.is_local:
            # Messages then name the user's files, not links that go with this folder.
            judged = Path(settings.source).expanduser().resolve()
            link_folder(judged, folder)
        else:
            commit = download(settings, settings.revision, folder, ["config.json"])
            # A model that cannot be trained is refused before its weights are fetched.
            checkpoints.read_shape(folder)
            download(settings, commit, folder, WANTED)
            Origin(source=settings.source, commit=commit).write(folder / "source.json")
        # Fail here, not after the data stages, when something a later stage needs is not there.
        checkpoints.check_whole(judged, checkpoints.read_shape(judged))
        tokenizer_files.find_tokenizer(judged)
    logger.info("wrote path=%s", arguments.checkpoint)


def download(settings: ModelSettings, revision: str | None, folder: Path, wanted: list[str]) -> str:
    """Files of the model's repository; returns the commit they are of."""
    assert settings.source is not None
    return hub.download(
        settings.source,
        revision,
        folder,
        kind="base model",
        key="models.<name>.source",
        wanted=wanted,
        unwanted=UNWANTED,
    )


def link_folder(source: Path, folder: Path) -> None:
    """Symbolic links to the files of a local checkpoint; nothing is copied."""
    if not source.is_dir():
        raise StageError(
            "the local base model is not there",
            where="models.<name>.source",
            found=f"{source} is no folder",
            expected="a folder with config.json, safetensors and the tokenizer",
        )
    for path in sorted(source.iterdir()):
        if path.is_file():
            (folder / path.name).symlink_to(path)
    Origin(source=str(source)).write(folder / "source.json")


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
