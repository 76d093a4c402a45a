"""What a run may begin with instead of training: an adapter, or a model that was merged elsewhere.

Nothing here logs: the Snakefile looks for a user's files by it, before the first job.
"""

from __future__ import annotations

from pathlib import Path

from workflow_scripts import files
from workflow_scripts.log import StageError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
# Patterns: the tokenizer and the template are the base's.
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model*.index.json",
)  # fmt: skip


def adapter_files(folder: Path) -> list[Path]:
    """An adapter as PEFT saves it.

    Raises:
        StageError: the folder holds none, or something that stands in for a file of it.
    """
    found = [folder / name for name in ADAPTER_FILES]
    missing = [path.name for path in found if not path.is_file()]
    if not missing:
        for path in found:
            files.check_whole(path)
        return found
    has_pickle = (folder / "adapter_model.bin").is_file()
    raise StageError(
        "the adapter is not there, or not whole",
        where=f"runs.<name>.adapter: {folder}",
        found=f"no {', '.join(missing)}",
        expected=" and ".join(ADAPTER_FILES),
        to_fix="load it with PEFT and save it again: adapter_model.bin is a pickle, which is not"
        " opened here"
        if has_pickle
        else "name the folder that PEFT's save_pretrained wrote",
    )


def model_files(folder: Path) -> list[Path]:
    """What is taken of a merged model.

    Raises:
        StageError: the folder holds none, or something that stands in for a file of it.
    """
    found = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern))
    has_weights = any(path.suffix == ".safetensors" for path in found)
    if not has_weights or not (folder / "config.json").is_file():
        raise StageError(
            "the merged model is not there, or not whole",
            where=f"runs.<name>.merged: {folder}",
            found=", ".join(path.name for path in found) or "none of its files",
            expected="config.json and model*.safetensors, as transformers' save_pretrained writes"
            " them",
        )
    for path in found:
        files.check_whole(path)
    return found
