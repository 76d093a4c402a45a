"""The files with which a run may begin instead of training: an adapter, or a model that was merged
elsewhere.

The Snakefile uses it too, to look for a user's files before the first job.
"""

from __future__ import annotations

from pathlib import Path

from workflow_scripts import files, hub
from workflow_scripts.log import StageError
from workflow_scripts.settings import is_local

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
# Without tokenizer and template, which are the base's.
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model*.index.json",
)  # fmt: skip


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter, as PEFT saves it.

    Raises:
        StageError: the folder does not hold one, or a file is a placeholder (Git LFS, a web page).
    """
    found = [folder / name for name in ADAPTER_FILES]
    missing = [path.name for path in found if not path.is_file()]
    if not missing:
        for path in found:
            files.check_whole(path)
        return found
    has_pickle = (folder / "adapter_model.bin").is_file()
    raise StageError(
        "the adapter is missing or incomplete",
        where=f"runs.<name>.adapter: {folder}",
        found=f"no {', '.join(missing)}",
        expected=" and ".join(ADAPTER_FILES),
        to_fix="load it with PEFT and save it again: adapter_model.bin is a pickle, which is not"
        " opened here"
        if has_pickle
        else "name the folder that PEFT's save_pretrained wrote",
    )


def model_files(folder: Path) -> list[Path]:
    """The files of a merged model that are used.

    Raises:
        StageError: the folder does not hold one, or a file is a placeholder (Git LFS, a web page).
    """
    found = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern))
    has_weights = any(path.suffix == ".safetensors" for path in found)
    if not has_weights or not (folder / "config.json").is_file():
        raise StageError(
            "the merged model is missing or incomplete",
            where=f"runs.<name>.merged: {folder}",
            found=", ".join(path.name for path in found) or "none of its files",
            expected="config.json and model*.safetensors, as transformers' save_pretrained writes"
            " them",
        )
    for path in found:
        files.check_whole(path)
    return found


def fetched(
    source: str, revision: str | None, folder: Path, *, kind: str, key: str, wanted: list[str]
) -> tuple[Path, str | None]:
    """The folder with a user's files, and the commit if they come from the Hub.

    Args:
        source: a local folder, which is returned as it is, or a repository of the Hub.
        folder: to download into.
        kind: what the files are, as a user calls it; for messages.
        key: of the config, which names the source.
        wanted: patterns of the files to download.
    """
    if is_local(source):
        return Path(source).expanduser(), None
    commit = hub.download(source, revision, folder, kind=kind, key=key, wanted=wanted)
    return folder, commit
