"""Text to token ids as mistral-common does it, each stretch of text encoded once and remembered.

A tokenizer that never joins what stands left and right of a place gives the same ids whether the
text is cut there or not. Cut at such places, chats repeat a vocabulary of words: most are looked
up, and the library is asked for the rest. Where the tokenizer's own file does not prove that the
cuts are safe, and where a text could fool them, the library is given the text whole.

Ids travel as the bytes of int32, in the machine's order: joining them is one call, and numpy reads
the result without a copy.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenizer

TOKEN_BYTES = array("i").itemsize
assert TOKEN_BYTES == 4

SPACE_MARK = "▁"  # SentencePiece writes a space as U+2581

# SentencePiece, its leading space already written: a run of spaces or of line ends with the word
# after it. No piece has a space behind another character, and none holds a line end.
SENTENCEPIECE_SEGMENT = re.compile(r"(?: +|\n+)[^ \n]*")

# The split of tekken's files since 2024, the only one that TEKKEN_SEGMENT is right for.
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A match of that split never runs over
#   1. a space that stands behind no white space: only the first character of a match may be a
#      space, unless the match is all white space;
#   2. a line end and what follows it, where that is blanks and then neither white space nor `/`:
#      punctuation takes line ends and `/` along, and `\s*[\r\n]+` ends at the last line end.
# Nor does it look over: `\s+(?!\S)` is tried only where no line end follows in the white space.
# Python's \s has four characters more than the split's (U+001C to U+001F), so what it takes for
# no white space is none there either. The last line takes all up to a cut of the first kind.
TEKKEN_SEGMENT = re.compile(
    r"[ \t]*\S+(?= |\Z)"
    r"|[ \t]*\S*[\r\n]+(?=[ \t]*[^\s/])"
    r"|[\s\S]+?(?=(?<=\S) |\Z)"
)

# About 50 MB a process for text; a segment of characters that have no piece may take 1 kB.
MAX_SEGMENTS = 250_000
MAX_SEGMENT_CHARACTERS = 48  # longer ones (links, hashes, lines without a space) rarely come again


class SegmentCache(dict[str, bytes]):
    """Token ids by segment. A missing one is encoded; the cache is emptied when it is full.

    Keeping the order of use, so as to drop the oldest alone, would cost more on every look-up than
    is lost by beginning again.
    """

    def __init__(self, encode: Callable[[str], bytes], *, max_segments: int = MAX_SEGMENTS) -> None:
        super().__init__()
        self._encode = encode
        self._max_segments = max_segments

    def __missing__(self, segment: str) -> bytes:
        token_ids = self._encode(segment)
        if len(segment) <= MAX_SEGMENT_CHARACTERS:
            if len(self) >= self._max_segments:
                self.clear()
            self[segment] = token_ids
        return token_ids


class TextEncoder:
    """Encodes text exactly as a tokenizer of mistral-common does, without BOS and EOS.

    Args:
        tokenizer: of the library; it stays as it is.
        max_segments: see `SegmentCache`.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_segments: int = MAX_SEGMENTS) -> None:
        from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece_tokenizer
        from mistral_common.tokens.tokenizers.tekken import is_tekkenizer

        self._library_encode = tokenizer.encode
        self._cache = SegmentCache(self.encode_whole, max_segments=max_segments)
        self.encode: Callable[[str], bytes] = self.encode_whole
        if is_sentencepiece_tokenizer(tokenizer) and _is_cut_at_spaces(tokenizer):
            self._cache = SegmentCache(self._encode_piecewise, max_segments=max_segments)
            self.encode = self._encode_sentencepiece
        elif is_tekkenizer(tokenizer) and tokenizer._model._pat_str == TEKKEN_SPLIT:
            self.encode = self._encode_tekken

    @property
    def uses_cache(self) -> bool:
        """Whether the tokenizer is one whose texts can be cut."""
        return self.encode != self.encode_whole

    def encode_whole(self, text: str) -> bytes:
        """The library's own encoding of a text in one piece."""
        return array("i", self._library_encode(text, bos=False, eos=False)).tobytes()

    def _encode_sentencepiece(self, text: str) -> bytes:
        if not text or SPACE_MARK in text:
            return self.encode_whole(text)
        segments = SENTENCEPIECE_SEGMENT.findall(" " + text)
        return b"".join(map(self._cache.__getitem__, segments))

    def _encode_piecewise(self, segment: str) -> bytes:
        """A segment that begins with a space or a line end.

        The library puts a space before every text: the segment's own, or one to take off again.
        """
        if segment == " ":  # nothing but the library's own
            return self.encode_whole("\n")[:TOKEN_BYTES]
        if segment[0] == " ":
            return self.encode_whole(segment[1:])
        return self.encode_whole(segment)[TOKEN_BYTES:]

    def _encode_tekken(self, text: str) -> bytes:
        return b"".join(map(self._cache.__getitem__, TEKKEN_SEGMENT.findall(text)))


def _is_cut_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a SentencePiece model's own file says that SENTENCEPIECE_SEGMENT cuts safely.

    That is: byte-pair merges, whose outcome left and right of a place that no piece spans is
    independent; every space kept as it is and one put before the text; unknown characters as
    bytes, one by one.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.file_path.read_bytes())
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    of_text = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    keeps_text = (
        normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
        and not trainer.treat_whitespace_as_suffix
    )
    is_bpe = trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
    spans_a_cut = any(
        "\n" in piece.piece or SPACE_MARK in piece.piece.lstrip(SPACE_MARK)
        for piece in model.pieces
        if piece.type in of_text
    )
    has_space = any(piece.piece == SPACE_MARK for piece in model.pieces)
    return keeps_text and is_bpe and trainer.byte_fallback and has_space and not spans_a_cut
