"""A release to serve: a GGUF, the tokenizer of its training, and its usable context."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaModel
from llama_cpp._logger import set_verbose

from workflow_scripts.handover.provenance import ReleasedRun
from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import find_tokenizer

FROM = re.compile(r"^FROM \./(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Release:
    """One model of one release."""

    name: str
    """Name of the run, or of the file if a file was named."""
    gguf: Path
    tokenizer: Path
    """Folder with Mistral's own tokenizer file."""
    context_tokens: int
    """Usable context: the GGUF's own figure, which is at most the sliding window."""


def read(path: Path) -> Release:
    """Read a release by its folder (then its Modelfile names the GGUF) or by one of its GGUFs.

    Any folder with GGUFs and the tokenizer file of their model is accepted.

    Raises:
        StageError: no such GGUF, several to choose from, or no tokenizer next to it.
    """
    folder = path if path.is_dir() else path.parent
    gguf = _default_gguf(path) if path.is_dir() else path
    if not gguf.is_file():
        raise StageError(
            "the release does not exist",
            where=gguf,
            expected="a folder that package_release made, or a GGUF in one",
        )
    find_tokenizer(folder)
    provenance = folder / "provenance.json"
    is_run = path.is_dir() and provenance.is_file()
    name = ReleasedRun.read(provenance).run if is_run else gguf.stem
    return Release(name, gguf, folder, context_of(gguf))


def context_of(gguf: Path) -> int:
    """The context in a GGUF's metadata, in tokens; the weights are not read.

    Raises:
        StageError: llama.cpp cannot read the file.
    """
    set_verbose(False)
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    try:
        model = LlamaModel(path_model=str(gguf), params=parameters, verbose=False)
    except ValueError as error:
        raise StageError("llama.cpp cannot read the GGUF", where=gguf, found=error) from error
    metadata = model.metadata()
    model.close()
    return int(metadata[f"{metadata['general.architecture']}.context_length"])


def _default_gguf(folder: Path) -> Path:
    modelfile = folder / "Modelfile"
    named = FROM.search(modelfile.read_text(encoding="utf-8")) if modelfile.is_file() else None
    if named:
        return folder / named.group(1)
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise StageError(
            "the folder does not say which GGUF to serve",
            where=folder,
            found=", ".join(path.name for path in found) or "no GGUF",
            to_fix="name the file",
        )
    return found[0]
