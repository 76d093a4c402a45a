"""A checkpoint's own tokenizer: which file it is, which Mistral version, and the files made from
it.

mistral-common, Mistral's own library, is the source of truth. The `tokenizer.json` and the chat
template that ship are made here from the same file, and the gate `check_tokens` proves that they
agree with it.
"""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files
from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

TEKKEN = "tekken"
OFFICIAL_V3 = "mistral_instruct_tokenizer_240323.model.v3"
# What tells the versions of SentencePiece files apart; v1 writes `[INST]` as text.
CONTROL_TOKENS = {
    "v2": ("[INST]", "[TOOL_CALLS]"),
    "v3": ("[INST]", "[TOOL_CALLS]"),
    "v7": ("[INST]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
}
VERSIONED_MODEL = re.compile(r"tokenizer\.model\.(v\d+)")
SPACE = "▁"  # SentencePiece writes a space as U+2581


def official_v3() -> Path:
    """Mistral's v3 tokenizer as published, which mistral-common carries."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / OFFICIAL_V3


def find_tokenizer(folder: Path, version: str | None = None) -> Path:
    """The tokenizer file that decides: `tekken.json`, `tokenizer.model.vN`, or `tokenizer.model`.

    Args:
        version: only a file that can be of this version; None takes the most telling.
    Raises:
        StageError: the folder has none of them, or something else under its name.
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
        " alone does not say which of Mistral's chat formats the model was trained on",
    )


def tokenizer_version(path: Path) -> str:
    """`v1`, `v2`, `v3`, `v7` … for SentencePiece; `tekken` for tekken.json.

    A bare `tokenizer.model` does not carry its version. 32,000 pieces is v1 (Mistral-7B v0.1, v0.2
    and Mixtral 8x7B ship it so); 32,768 pieces is v3, or v7 where it holds `[SYSTEM_PROMPT]`.
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
    """Whether a SentencePiece file can be used as `version`.

    The library would write the unknown token where a control token is missing, without a word.

    Raises:
        StageError: it lacks a control token of that version.
    """
    missing = _lacks(path, version)
    if missing is not None:
        raise StageError(
            "the tokenizer cannot be of the version asked for",
            where=path,
            found=f"no control token {missing}",
            expected=f"the control tokens of {version} (models.<name>.tokenizer_version)",
            to_fix="set tokenizer_version: null, or add the tokenizer file of that version",
        )


def _lacks(path: Path, version: str) -> str | None:
    """The first control token of a version that a SentencePiece file does not have."""
    pieces = _sentencepiece(path)
    for token in CONTROL_TOKENS.get(version, ()):
        token_id = pieces.piece_to_id(token)
        if not pieces.is_control(token_id):
            return token
    return None


def n_tokens(path: Path) -> int:
    """Tokens of a tokenizer file, control tokens included."""
    if path.name == "tekken.json":
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        try:
            return Tekkenizer.from_file(path).n_words
        except (ValueError, KeyError, TypeError) as error:
            raise unreadable(path, error) from error
    return _sentencepiece(path).get_piece_size()


def check_vocabulary(path: Path, n_rows: int, *, where: Path) -> None:
    """Every token has a row of the embeddings, and every row a token.

    Rows beyond the tokenizer's are refused as well, though training would not notice: the merged
    folder's tokenizer and llama.cpp's converter both need one number. Such rows are tokens that a
    fine-tune added (ChatML's two), or padding.

    Args:
        path: the tokenizer file that decides.
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
            "take the base that this model was made of; or remove the rows without a token, if"
            " chats in Mistral's format need none of them: in transformers,"
            f" model.resize_token_embeddings({found}), then save_pretrained to a new folder, with"
            " the tokenizer file"
        )
    else:
        to_fix = (
            "put the model's own tokenizer file into its folder: with this one, text would be"
            " encoded to tokens that the model has no embeddings for"
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


def export(checkpoint: Path, folder: Path, version: str | None = None) -> str:
    """Write the tokenizer that ships: original file, `tokenizer.json`, its config, the chat
    template.

    Args:
        version: `models.<name>.tokenizer_version`; None reads it from the files.
    Returns:
        The tokenizer's version.
    Raises:
        StageError: no readable tokenizer, or one that cannot be of `version`.
    """
    from mistral_common.integrations.chat_templates.chat_templates import (
        convert_tokenizer_to_chat_template,
    )

    original = find_tokenizer(checkpoint, version)
    version = version or tokenizer_version(original)
    folder.mkdir(parents=True, exist_ok=True)
    if version == TEKKEN:
        deciding = folder / "tekken.json"
        shutil.copyfile(original, deciding)
        tokenizer = tekken_to_tokenizer(original)
    else:
        check_version(original, version)
        # Two names, one content: mistral-common reads the version from the suffix, llama.cpp's
        # converter looks for the bare name and without it falls back to scores that mis-tokenize.
        deciding = folder / f"tokenizer.model.{version}"
        shutil.copyfile(original, deciding)
        shutil.copyfile(original, folder / "tokenizer.model")
        tokenizer = sentencepiece_to_tokenizer(original)
    tokenizer.save(str(folder / "tokenizer.json"))
    files.write_json(
        folder / "tokenizer_config.json",
        {
            # The class that takes tokenizer.json as it is; LlamaTokenizer would rebuild it its own
            # way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
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
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    protobuf: Any = sentencepiece_model_pb2  # it makes its classes at run time
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
    _put_bos_in_front(tokenizer)
    return tokenizer


def tekken_to_tokenizer(path: Path) -> Tokenizer:
    """The Hugging Face tokenizer of a tekken file: byte-level BPE behind the file's own split.

    tiktoken merges whichever pair makes the token of the lowest rank, so every pair of tokens that
    makes a token is a merge of that rank; a stretch that is a token itself is not merged at all
    (`ignore_merges`). Control tokens come first, so text begins at their number.

    Source: tiktoken's `byte_pair_encode`; llama.cpp recognizes the outcome as Mistral-Nemo's.
    """
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tekken = Tekkenizer.from_file(path)
    control = [tekken.id_to_piece(token_id) for token_id in range(tekken.num_special_tokens)]
    ranks = {
        tekken.id_to_byte_piece(token_id): token_id
        for token_id in range(tekken.num_special_tokens, tekken.n_words)
    }
    # In the order of rank. Which of several pairs that make one token stands first has shown no
    # difference: the outcome is the same with the longest left part first and with the shortest.
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


def unreadable(path: Path, error: Exception) -> StageError:
    """The message of a tokenizer file that its library cannot read."""
    return StageError(
        "the tokenizer file cannot be read",
        where=path,
        found=f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        f" ({path.stat().st_size:,} bytes)",
        expected="tekken.json or a SentencePiece model, as Mistral publishes it",
        to_fix="fetch it again: it is damaged or cut short",
    )


def byte_characters() -> list[str]:
    """The character that byte-level BPE files write for each byte: itself where it is visible in
    Latin-1, else the next one from U+0100.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = itertools.count(0x100)
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


def _put_bos_in_front(tokenizer: Tokenizer) -> None:
    from tokenizers import processors

    bos = "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def _sentencepiece(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
