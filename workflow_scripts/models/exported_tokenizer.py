"""The exported tokenizer: the original file, a `tokenizer.json` made from it, the chat template.

The gate `check_tokens` proves that `tokenizer.json` and the template agree with mistral-common.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

from mistral_common.integrations.chat_templates.chat_templates import (
    convert_tokenizer_to_chat_template,
)
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from workflow_scripts import files
from workflow_scripts.models.tokenizer_files import (
    TEKKEN,
    check_version,
    find_tokenizer,
    tokenizer_version,
)

SPACE = "▁"  # SentencePiece writes a space as U+2581


def export(checkpoint: Path, folder: Path, version: str | None = None) -> str:
    """Write the original file, `tokenizer.json`, its config and the chat template to a folder.

    Args:
        version: `models.<name>.tokenizer_version`; None reads it from the files.
    Returns:
        The tokenizer's version.
    Raises:
        StageError: there is no readable tokenizer, or it does not fit `version`.
    """
    original = find_tokenizer(checkpoint, version)
    version = version or tokenizer_version(original)
    folder.mkdir(parents=True, exist_ok=True)
    if version == TEKKEN:
        deciding = folder / "tekken.json"
        shutil.copyfile(original, deciding)
        tokenizer = tekken_to_tokenizer(original)
    else:
        check_version(original, version)
        # Two names, same content: mistral-common reads the version from the suffix; llama.cpp's
        # converter needs the plain name, and without it uses scores that give wrong tokens.
        deciding = folder / f"tokenizer.model.{version}"
        shutil.copyfile(original, deciding)
        shutil.copyfile(original, folder / "tokenizer.model")
        tokenizer = sentencepiece_to_tokenizer(original)
    tokenizer.save(str(folder / "tokenizer.json"))
    files.write_json(
        folder / "tokenizer_config.json",
        {
            # This class uses tokenizer.json unchanged; LlamaTokenizer would rebuild it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            # Else llama.cpp adds a space after every control token, in addition to the template's.
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        },
    )
    files.write_text(folder / "chat_template.jinja", convert_tokenizer_to_chat_template(deciding))
    return version


def sentencepiece_to_tokenizer(path: Path) -> Tokenizer:
    """Convert a SentencePiece BPE model with byte fallback to a Hugging Face tokenizer.

    It adds BOS. It adds a space only at the very start of the input (`first`), because the official
    templates write the space after each control token themselves.

    Source: sentencepiece's `ModelProto`; merged by score, as `sentencepiece/src/bpe_model.cc`.
    """
    protobuf: Any = sentencepiece_model_pb2  # its classes are made at run time
    model = protobuf.ModelProto.FromString(path.read_bytes())
    piece_type = protobuf.ModelProto.SentencePiece.Type
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    mergeable = {
        piece.piece: piece.score for piece in model.pieces if piece.type == piece_type.NORMAL
    }
    merges: list[tuple[float, int, int, str, str]] = []
    for text, score in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                # SentencePiece merges by score (ids are almost in that order), the leftmost pair
                # first among equals. Only runs of spaces share a score (the lowest); there the
                # left run grows first, so the longest left part comes first.
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
    _put_bos_in_front(tokenizer)
    return tokenizer


def tekken_to_tokenizer(path: Path) -> Tokenizer:
    """Convert a tekken file to a Hugging Face tokenizer: byte-level BPE after the file's split.

    tiktoken merges the pair that makes the token of the lowest rank, so every pair of tokens that
    makes a token is a merge of that rank. A piece of text that is itself a token is not merged at
    all (`ignore_merges`). Control tokens come first, so text tokens begin after them.

    Source: tiktoken's `byte_pair_encode`; llama.cpp recognizes the result as Mistral-Nemo's.
    """
    tekken = Tekkenizer.from_file(path)
    control = [tekken.id_to_piece(token_id) for token_id in range(tekken.num_special_tokens)]
    ranks = {
        tekken.id_to_byte_piece(token_id): token_id
        for token_id in range(tekken.num_special_tokens, tekken.n_words)
    }
    # In order of rank. The order of several pairs that make the same token does not matter: the
    # result is the same with the longest left part first and with the shortest.
    merges = [
        (token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    character = byte_characters()

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    vocabulary = {token: token_id for token_id, token in enumerate(control)}
    vocabulary |= {written(token): token_id for token, token_id in ranks.items()}
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(written(left), written(right)) for left, right in merges],
            ignore_merges=True,
        )
    )
    split = Regex(tekken._model._pat_str)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    _put_bos_in_front(tokenizer)
    return tokenizer


def byte_characters() -> list[str]:
    """Return the character that byte-level BPE files use for each byte.

    A byte that is visible in Latin-1 is written as itself, any other as the next from U+0100.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = itertools.count(0x100)
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


def _put_bos_in_front(tokenizer: Tokenizer) -> None:
    bos = "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
