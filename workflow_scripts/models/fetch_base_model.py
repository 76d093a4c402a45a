"""Bring a base model into the workflow: download it from the Hugging Face Hub, or link a folder.

The repository and the resolved commit are written to `source.json` in the same folder. Set HF_TOKEN
for gated repositories, HF_HUB_CACHE and HF_ENDPOINT as usual.

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
from workflow_scripts.models import checkpoint_files, tokenizer_files
from workflow_scripts.settings import ModelSettings, settings_from_json

OUTPUT_VERSION = 1
# The weights that transformers reads; `consolidated*` and .bin files repeat them and would double
# the download.
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
        raise StageError("no source to fetch from", where="--settings, source", found="null")

    with files.atomic_folder(arguments.checkpoint) as folder:
        judged = folder
        if settings.is_local:
            # Messages then name the user's files, not the links in a temporary folder.
            judged = Path(settings.source).expanduser().resolve()
            link_folder(judged, folder)
        else:
            commit = download(settings, settings.revision, folder, ["config.json"])
            # Refuse a model that cannot be trained before its weights are fetched.
            checkpoint_files.read_shape(folder)
            download(settings, commit, folder, WANTED)
            Origin(source=settings.source, commit=commit).write(folder / "source.json")
        # If a file that later stages need is missing, fail here, not after the data stages.
        checkpoint_files.check_whole(judged, checkpoint_files.read_shape(judged))
        tokenizer_files.find_tokenizer(judged)
    logger.info("wrote path=%s", arguments.checkpoint)


def download(settings: ModelSettings, revision: str | None, folder: Path, wanted: list[str]) -> str:
    """Download files of the model's repository, and return their commit."""
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
    """Make symbolic links to the files of a local checkpoint; nothing is copied."""
    if not source.is_dir():
        raise StageError(
            "the local base model is missing",
            where="models.<name>.source",
            found=f"{source} is not a folder",
            expected="a folder with config.json, safetensors and the tokenizer",
        )
    for path in sorted(source.iterdir()):
        if path.is_file():
            (folder / path.name).symlink_to(path)
    Origin(source=str(source)).write(folder / "source.json")


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
