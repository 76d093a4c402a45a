"""A checkpoint's own tokenizer: which file it is, which Mistral version, and the files made from
it.

mistral-common, Mistral's own library, is the source of truth. The `tokenizer.json` and the chat
template that ship are made here from the same file, and the gate `check_tokens` proves that they
agree with it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files
from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

VERSIONED_MODEL = re.compile(r"tokenizer\.model\.(v\d+)")
SPACE = "▁"  # SentencePiece writes a space as U+2581


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer file that decides: `tekken.json`, `tokenizer.model.vN`, or `tokenizer.model`.

    Raises:
        StageError: the folder has none of them.
    """
    tekken = folder / "tekken.json"
    if tekken.is_file():
        return tekken
    versioned = [path for path in folder.glob("*") if VERSIONED_MODEL.fullmatch(path.name)]
    if versioned:
        return max(versioned, key=lambda path: int(path.name.rpartition("v")[2]))
    bare = folder / "tokenizer.model"
    if bare.is_file():
        return bare
    raise StageError(
        "the checkpoint has no tokenizer that mistral-common reads",
        where=folder,
        found=", ".join(sorted(path.name for path in folder.glob("*token*")))
        or "no tokenizer file",
        expected="tekken.json, tokenizer.model.v1 … v7, or tokenizer.model",
        to_fix="add the original tokenizer file of the base model to the folder",
    )


def tokenizer_version(path: Path) -> str:
    """`v1`, `v2`, `v3`, `v7` … for SentencePiece; `tekken` for tekken.json.

    A bare `tokenizer.model` does not carry its version. 32,000 pieces is v1 (Mistral-7B v0.1, v0.2
    and Mixtral 8x7B ship it so); 32,768 pieces is v3, or v7 where it holds `[SYSTEM_PROMPT]`.
    """
    if path.name == "tekken.json":
        return "tekken"
    match = VERSIONED_MODEL.fullmatch(path.name)
    if match:
        return match.group(1)
    pieces = _sentencepiece(path)
    if pieces.get_piece_size() < 32_768:
        return "v1"
    is_v7 = any(
        pieces.id_to_piece(token_id) == "[SYSTEM_PROMPT]"
        for token_id in range(pieces.get_piece_size())
    )
    return "v7" if is_v7 else "v3"


def load_mistral_tokenizer(folder: Path, *, for_training: bool) -> MistralTokenizer:
    """mistral-common's tokenizer of an exported folder.

    Args:
        folder: written by `export_tokenizer`.
        for_training: conversations end with an answer and are validated as fine-tuning data; else
        they
            end with a question.
    """
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    mode = ValidationMode.finetuning if for_training else ValidationMode.test
    return MistralTokenizer.from_file(find_tokenizer(folder), mode=mode)


def export(checkpoint: Path, folder: Path) -> str:
    """Write the tokenizer that ships: original file, `tokenizer.json`, its config, the chat
    template.

    Returns:
        The tokenizer's version.
    Raises:
        StageError: no readable tokenizer; or a tekken checkpoint without `tokenizer.json`.
    """
    from mistral_common.integrations.chat_templates.chat_templates import (
        convert_tokenizer_to_chat_template,
    )

    original = find_tokenizer(checkpoint)
    version = tokenizer_version(original)
    folder.mkdir(parents=True, exist_ok=True)
    if version == "tekken":
        deciding = folder / "tekken.json"
        shutil.copyfile(original, deciding)
        _copy_required(checkpoint / "tokenizer.json", folder / "tokenizer.json")
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        # Two names, one content: mistral-common reads the version from the suffix, llama.cpp's
        # converter looks for the bare name and without it falls back to scores that mis-tokenize.
        deciding = folder / f"tokenizer.model.{version}"
        shutil.copyfile(original, deciding)
        shutil.copyfile(original, folder / "tokenizer.model")
        sentencepiece_to_tokenizer(original).save(str(folder / "tokenizer.json"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files.write_json(
        folder / "tokenizer_config.json",
        {
            # The class that takes tokenizer.json as it is; LlamaTokenizer would rebuild it its own
            # way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": True,
            "add_eos_token": False,
            # llama.cpp would add a space after every control token, beside the template's own.
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        },
    )
    files.write_text(folder / "chat_template.jinja", convert_tokenizer_to_chat_template(deciding))
    return version


def sentencepiece_to_tokenizer(path: Path) -> Tokenizer:
    """The Hugging Face tokenizer of a SentencePiece BPE model with byte fallback.

    BOS goes in front. A space is put before the text only at the very start of the input
    (`first`), as the official templates write the one after each control token themselves.

    Source: sentencepiece's `ModelProto`; merged by score, as `sentencepiece/src/bpe_model.cc`.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    piece_type = sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    mergeable = {
        piece.piece: piece.score for piece in model.pieces if piece.type == piece_type.NORMAL
    }
    merges: list[tuple[float, int, int, str, str]] = []
    for text, score in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                # SentencePiece merges by score (ids do not quite follow it), and the leftmost pair
                # among equals. Only runs of spaces share a score (the lowest), where leftmost means
                # that the run on the left grows first: so, longest left part first.
                merges.append((-score, -len(left), vocabulary[right], left, right))
    merges.sort()
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    control = [
        piece.piece
        for piece in model.pieces
        if piece.type in (piece_type.CONTROL, piece_type.UNKNOWN, piece_type.USER_DEFINED)
    ]
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in control]
    )
    bos = "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return tokenizer


def _sentencepiece(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path))


def _copy_required(source: Path, target: Path) -> None:
    if not source.is_file():
        raise StageError(
            "a tekken checkpoint comes without its tokenizer.json",
            where=source,
            to_fix="download tokenizer.json from the model's repository into the checkpoint folder",
        )
    json.loads(source.read_text(encoding="utf-8"))
    shutil.copyfile(source, target)
