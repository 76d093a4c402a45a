"""A checkpoint's own tokenizer: its file, Mistral's version of it, and its vocabulary.

mistral-common, Mistral's own library, is the reference.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from sentencepiece import SentencePieceProcessor

from workflow_scripts import files
from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TEKKEN = "tekken"
OFFICIAL_V3 = "mistral_instruct_tokenizer_240323.model.v3"
# Control tokens that distinguish versions of SentencePiece files; v1 writes `[INST]` as text.
CONTROL_TOKENS = {
    "v2": ("[INST]", "[TOOL_CALLS]"),
    "v3": ("[INST]", "[TOOL_CALLS]"),
    "v7": ("[INST]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
}
VERSIONED_MODEL = re.compile(r"tokenizer\.model\.(v\d+)")


def official_v3() -> Path:
    """Return the path of Mistral's published v3 tokenizer, which mistral-common contains."""
    return Path(str(resources.files("mistral_common") / "data" / OFFICIAL_V3))


def find_tokenizer(folder: Path, version: str | None = None) -> Path:
    """Find the tokenizer file: `tekken.json`, `tokenizer.model.vN`, or `tokenizer.model`.

    Args:
        version: accept only a file that can have this version; None prefers names with a version.
    Raises:
        StageError: the folder has none of them, or the file is a placeholder.
    """
    found = _find(folder, version)
    files.check_whole(found)
    return found


def _find(folder: Path, version: str | None) -> Path:
    tekken = folder / "tekken.json"
    if tekken.is_file() and version in (None, TEKKEN):
        return tekken
    if version != TEKKEN:
        versioned = [path for path in folder.glob("*") if VERSIONED_MODEL.fullmatch(path.name)]
        named = folder / f"tokenizer.model.{version}"
        if named in versioned:
            return named
        if versioned:
            return max(versioned, key=lambda path: int(path.name.rpartition("v")[2]))
        bare = folder / "tokenizer.model"
        if bare.is_file():
            return bare
    expected = {
        None: "tekken.json, tokenizer.model.v1 … v7, or tokenizer.model",
        TEKKEN: "tekken.json",
    }
    raise StageError(
        "the checkpoint has no tokenizer that mistral-common reads",
        where=folder,
        found=", ".join(sorted(path.name for path in folder.glob("*token*")))
        or "no tokenizer file",
        expected=expected.get(version, f"tokenizer.model.{version} or tokenizer.model"),
        to_fix="add the original tokenizer file of the base model to the folder; tokenizer.json"
        " alone does not show which of Mistral's chat formats the model was trained on",
    )


def tokenizer_version(path: Path) -> str:
    """Return `v1`, `v2`, `v3`, `v7` … for SentencePiece, `tekken` for tekken.json.

    A plain `tokenizer.model` does not state its version. With 32,000 pieces it is v1 (Mistral-7B
    v0.1, v0.2 and Mixtral 8x7B); with 32,768 pieces it is v3, or v7 if it has `[SYSTEM_PROMPT]`.
    """
    if path.name == "tekken.json":
        return TEKKEN
    match = VERSIONED_MODEL.fullmatch(path.name)
    if match:
        return match.group(1)
    if _sentencepiece(path).get_piece_size() < 32_768:
        return "v1"
    return "v7" if _lacks(path, "v7") is None else "v3"


def check_version(path: Path, version: str) -> None:
    """Check that a SentencePiece file can be used as `version`.

    mistral-common silently writes the unknown token if a control token is missing.

    Raises:
        StageError: the file lacks a control token of the version.
    """
    missing = _lacks(path, version)
    if missing is not None:
        raise StageError(
            "the tokenizer file does not fit the requested version",
            where=path,
            found=f"no control token {missing}",
            expected=f"the control tokens of {version} (models.<name>.tokenizer_version)",
            to_fix="set tokenizer_version: null, or add the tokenizer file of that version",
        )


def _lacks(path: Path, version: str) -> str | None:
    """Return the first control token of a version that a SentencePiece file lacks."""
    pieces = _sentencepiece(path)
    for token in CONTROL_TOKENS.get(version, ()):
        token_id = pieces.piece_to_id(token)
        if not pieces.is_control(token_id):
            return token
    return None


def n_tokens(path: Path) -> int:
    """Count the tokens of a tokenizer file, control tokens included."""
    if path.name == "tekken.json":
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer  # 0.7 s

        try:
            return Tekkenizer.from_file(path).n_words
        except (ValueError, KeyError, TypeError) as error:
            raise unreadable(path, error) from error
    return _sentencepiece(path).get_piece_size()


def check_vocabulary(path: Path, n_rows: int, *, where: Path) -> None:
    """Check that there are as many rows of embeddings as tokens.

    More rows than tokens are refused too, although training would work: the merged model's
    tokenizer and llama.cpp's converter both need equal numbers. Such rows are tokens that a
    fine-tune added (ChatML's two), or padding.

    Args:
        path: the tokenizer file, from `find_tokenizer`.
        n_rows: rows of the embeddings, `vocabulary_size` of the facts.
        where: config.json of the checkpoint, for the message.
    Raises:
        StageError: the two numbers differ.
    """
    found = n_tokens(path)
    if found == n_rows:
        return
    if n_rows > found:
        to_fix = (
            "use the base model that this model was made from; or, if chats in Mistral's format do"
            " not need the rows without a token, remove them: in transformers,"
            f" model.resize_token_embeddings({found}), then save_pretrained to a new folder, with"
            " the tokenizer file"
        )
    else:
        to_fix = (
            "put the model's own tokenizer file into its folder: this one encodes text to tokens"
            " that have no embeddings in the model"
        )
    raise StageError(
        f"the model has {'more' if n_rows > found else 'fewer'} embeddings than its tokenizer has"
        " tokens",
        where=f"{where}, vocab_size",
        found=f"{n_rows} rows of embeddings, {found} tokens in {path.name}",
        expected="one row for every token",
        to_fix=to_fix,
    )


def load_mistral_tokenizer(folder: Path, *, for_training: bool) -> MistralTokenizer:
    """Load mistral-common's tokenizer from an exported folder.

    Args:
        folder: written by `export_tokenizer`.
        for_training: conversations end with an answer and are validated as fine-tuning data;
            otherwise they end with a question.
    """
    # 0.7 s that the --help of programs, which import this function, must not wait for.
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    mode = ValidationMode.finetuning if for_training else ValidationMode.test
    return MistralTokenizer.from_file(find_tokenizer(folder), mode=mode)


def unreadable(path: Path, error: Exception) -> StageError:
    """Make the error for a tokenizer file that its library cannot read."""
    return StageError(
        "the tokenizer file cannot be read",
        where=path,
        found=f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        f" ({path.stat().st_size:,} bytes)",
        expected="tekken.json or a SentencePiece model, as Mistral publishes it",
        to_fix="fetch it again: it is damaged or truncated",
    )


def _sentencepiece(path: Path) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
