"""What each token says, where a character's bytes may be spread over several of them.

A character without a piece of its own is written in UTF-8 bytes: a token each in SentencePiece, and
in tekken any cut of them. It is legible only once its last byte is there; until then its bytes are.
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
    """Control tokens by name; else the characters that end in this token."""
    first_bytes: bytes = b""
    """Those that complete a character begun in the tokens before: the first of `text`, or, where
    the bytes are no UTF-8, none."""
    last_bytes: bytes = b""
    """Those of a character that is not complete yet."""


def token_texts(tokenizer: Tokenizer, token_ids: Iterable[int]) -> Iterator[TokenText]:
    """The text of each token.

    Args:
        tokenizer: mistral-common's, SentencePiece or tekken.
        token_ids: of one document, from its start.
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
    """Not text; SentencePiece does not count `<unk>` among its control tokens."""
    return token_id == tokenizer.unk_id or tokenizer.is_special(token_id)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The UTF-8 of a token that is text."""
    from mistral_common.tokens.tokenizers.tekken import is_tekkenizer

    if is_tekkenizer(tokenizer):
        return tokenizer.id_to_byte_piece(token_id)
    piece = tokenizer.id_to_piece(token_id)
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE_PIECE, " ").encode()
