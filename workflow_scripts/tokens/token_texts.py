"""The text of each token, for tokenizers that may spread a character's bytes over several tokens.

A character that is not in the vocabulary is written as UTF-8 bytes: one token per byte in
SentencePiece, any grouping of bytes in tekken. It is readable only when its last byte is there;
until then its bytes are shown.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE_PIECE = "▁"  # SentencePiece writes a space as U+2581


class TokenText(NamedTuple):
    """One token as text."""

    is_control: bool
    text: str
    """The name of a control token; else the characters whose last byte is in this token."""
    first_bytes: bytes = b""
    """Bytes that complete a character begun in earlier tokens. The character is the first of
    `text`; if the bytes are not valid UTF-8 there is none."""
    last_bytes: bytes = b""
    """Bytes of a character that later tokens complete."""


def token_texts(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[TokenText]:
    """Yield the text of each token.

    Args:
        tokenizer: mistral-common's, SentencePiece or tekken.
        token_ids: tokens of one document, from its start.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for token_id in token_ids:
        if is_control(tokenizer, token_id):
            decoder.reset()
            yield TokenText(True, tokenizer.id_to_piece(token_id))
            continue
        begun = decoder.getstate()[0]
        encoded = token_bytes(tokenizer, token_id)
        try:
            text = decoder.decode(encoded)
        except UnicodeDecodeError:
            decoder.reset()
            yield TokenText(False, "", first_bytes=encoded)
            continue
        unfinished = decoder.getstate()[0]
        if not text:
            yield TokenText(False, "", last_bytes=encoded)
            continue
        n_first = len(text[0].encode()) - len(begun) if begun else 0
        yield TokenText(False, text, encoded[:n_first], unfinished)


def is_control(tokenizer: Tokenizer, token_id: int) -> bool:
    """True for a token that is not text; SentencePiece does not mark `<unk>` as a control token."""
    return token_id == tokenizer.unk_id or tokenizer.is_special(token_id)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return the UTF-8 bytes of a text token."""
    from mistral_common.tokens.tokenizers.tekken import is_tekkenizer  # 0.7 s

    if is_tekkenizer(tokenizer):
        return tokenizer.id_to_byte_piece(token_id)
    piece = tokenizer.id_to_piece(token_id)
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE_PIECE, " ").encode()
