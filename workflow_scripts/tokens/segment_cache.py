"""Text to token ids, identical to mistral-common's, with a cache of encoded segments.

If a tokenizer never merges across a position, cutting the text there does not change the ids.
Chats cut at such positions repeat a vocabulary of words: most are looked up, and the library
encodes the rest. If the tokenizer's own file does not prove that the cuts are safe, or a text
contains a character that would break them, the library encodes the whole text.

Ids are kept as the bytes of int32 in native order: joining them is one call, and numpy reads the
result without a copy.
"""

from __future__ import annotations

import itertools
import operator
import re
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from sentencepiece import sentencepiece_model_pb2

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenizer

TOKEN_BYTES = array("i").itemsize
assert TOKEN_BYTES == 4

SPACE_MARK = "▁"  # SentencePiece writes a space as U+2581

# For SentencePiece, with the leading space already added: a run of spaces or line ends and the word
# after it. No piece has a space after another character, and none contains a line end.
SENTENCEPIECE_SEGMENT = re.compile(r"(?: +|\n+)[^ \n]*")

# The split pattern of tekken files since 2024. TEKKEN_SEGMENT is valid for this one only.
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A match of that pattern never extends across
#   1. a space after a character that is not white space: only the first character of a match may be
#      a space, unless the match is all white space;
#   2. a line end that is followed by blanks and then neither white space nor `/`: punctuation
#      matches line ends and `/` after it, and `\s*[\r\n]+` ends at the last line end.
# Lookahead does not extend across them either: `\s+(?!\S)` is tried only if no line end follows in
# the white space. Python's \s matches four more characters than the pattern's (U+001C to U+001F),
# so what Python's \S matches is not white space there either. The last alternative takes everything
# up to a cut of the first kind.
TEKKEN_SEGMENT = re.compile(
    r"[ \t]*\S+(?= |\Z)"
    r"|[ \t]*\S*[\r\n]+(?=[ \t]*[^\s/])"
    r"|[\s\S]+?(?=(?<=\S) |\Z)"
)

# About 120 MB per process for text; a segment of characters without a piece may take 1 kB.
MAX_SEGMENTS = 600_000
MAX_SEGMENT_CHARACTERS = 48  # longer ones (links, hashes, lines without a space) rarely repeat


class SegmentCache:
    """Token ids by segment, in two generations: a full newer one replaces the older one.

    A segment found in the older generation is copied to the newer one, so common words stay. An
    exact order of use would make every look-up slower.

    Args:
        encode: returns the token ids of each of several segments.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Sequence[bytes]],
        *,
        max_segments: int = MAX_SEGMENTS,
    ) -> None:
        self._encode = encode
        self._max_newer = max_segments // 2
        self._newer: dict[str, bytes] = {}
        self._older: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._newer) + len(self._older)

    def look_up(self, texts: Sequence[Sequence[str]]) -> list[list[bytes]]:
        """Return the token ids of the segments of several texts; new ones are encoded in one call.

        Each segment is looked up once, because look-ups take most of the time.
        """
        known = self._newer.get
        found: list[list[bytes | None]] = [list(map(known, segments)) for segments in texts]
        unseen: set[str] = set()
        with_gaps = []
        for segments, own in zip(texts, found, strict=True):
            if None in own:
                is_gap = map(operator.is_, own, itertools.repeat(None))
                unseen.update(itertools.compress(segments, is_gap))
                with_gaps.append((segments, own))
        if not with_gaps:
            return cast("list[list[bytes]]", found)
        fresh = {segment: self._older[segment] for segment in unseen & self._older.keys()}
        new = sorted(unseen - fresh.keys())
        fresh.update(zip(new, self._encode(new), strict=True))
        for segments, own in with_gaps:
            for at, token_ids in enumerate(own):
                if token_ids is None:
                    own[at] = fresh[segments[at]]
        self._remember(fresh)
        return cast("list[list[bytes]]", found)  # the gaps are filled

    def _remember(self, fresh: dict[str, bytes]) -> None:
        short = (item for item in fresh.items() if len(item[0]) <= MAX_SEGMENT_CHARACTERS)
        kept = dict(itertools.islice(short, self._max_newer))
        if len(self._newer) + len(kept) > self._max_newer:
            self._older, self._newer = self._newer, {}
        self._newer.update(kept)


class TextEncoder:
    """Encodes text exactly as a tokenizer of mistral-common does, without BOS and EOS.

    Args:
        tokenizer: mistral-common's tokenizer; it is not changed.
        max_segments: see `SegmentCache`.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_segments: int = MAX_SEGMENTS) -> None:
        from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece_tokenizer
        from mistral_common.tokens.tokenizers.tekken import is_tekkenizer

        self._library_encode = tokenizer.encode
        library: Any = tokenizer  # its classes have `_model`, their base class does not
        self._library_model = library._model
        self._cut: Callable[[str], list[str]] | None = None
        self._cache = SegmentCache(lambda segments: [], max_segments=max_segments)
        if is_sentencepiece_tokenizer(tokenizer) and _is_cut_at_spaces(tokenizer):
            self._cut = cut_sentencepiece
            self._space_id = tokenizer._model.encode("\n")[:1]
            self._cache = SegmentCache(self._encode_segments, max_segments=max_segments)
        elif is_tekkenizer(tokenizer) and tokenizer._model._pat_str == TEKKEN_SPLIT:
            self._cut = TEKKEN_SEGMENT.findall
            self._cache = SegmentCache(
                lambda segments: list(map(self.encode_whole, segments)), max_segments=max_segments
            )

    @property
    def uses_cache(self) -> bool:
        """True if texts can be cut for this tokenizer."""
        return self._cut is not None

    def encode(self, text: str) -> bytes:
        """Encode one text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[bytes]:
        """Encode many texts, which is faster than one by one."""
        if self._cut is None:
            return list(map(self.encode_whole, texts))
        segments = [[] if SPACE_MARK in text else self._cut(text) for text in texts]
        return [
            self.encode_whole(text) if SPACE_MARK in text else b"".join(found)
            for text, found in zip(texts, self._cache.look_up(segments), strict=True)
        ]

    def encode_whole(self, text: str) -> bytes:
        """Encode a whole text with the library."""
        return array("i", self._library_encode(text, bos=False, eos=False)).tobytes()

    def _encode_segments(self, segments: Sequence[str]) -> list[bytes]:
        """Encode segments of `cut_sentencepiece`.

        The library adds a space before every text. It is the segment's own leading space, or, if
        the segment begins with a line end, it is removed again.
        """
        texts = [segment[1:] if segment[0] == " " else segment for segment in segments]
        encoded = self._library_model.encode(texts, num_threads=1)
        return [
            # The library encodes a space followed by nothing as no ids.
            array("i", ids[segment[0] == "\n" :] or self._space_id).tobytes()
            for segment, ids in zip(segments, encoded, strict=True)
        ]


def cut_sentencepiece(text: str) -> list[str]:
    """Cut a text into segments: words with an implied leading space, or segments that begin with a
    line end. If the text has several spaces in a row, segments begin with their literal spaces.
    """
    if not text:
        return []
    spaced = text.replace("\n", " \n")
    if spaced[0] == " " or spaced[-1] == " " or "  " in spaced:
        return SENTENCEPIECE_SEGMENT.findall(" " + text)
    return spaced.split(" ")  # five times as fast


def _is_cut_at_spaces(tokenizer: Tokenizer) -> bool:
    """True if a SentencePiece model's file proves that SENTENCEPIECE_SEGMENT cuts safely.

    The model must use byte-pair merges (left and right of a position that no piece spans they are
    independent), keep every space, add one before the text, and write unknown characters as single
    bytes.
    """
    protobuf: Any = sentencepiece_model_pb2  # it makes its classes at run time
    model = protobuf.ModelProto.FromString(tokenizer.file_path.read_bytes())
    kinds = protobuf.ModelProto.SentencePiece.Type
    of_text = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    keeps_text = (
        normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
        and not trainer.treat_whitespace_as_suffix
    )
    is_bpe = trainer.model_type == protobuf.TrainerSpec.BPE
    spans_a_cut = any(
        "\n" in piece.piece or SPACE_MARK in piece.piece.lstrip(SPACE_MARK)
        for piece in model.pieces
        if piece.type in of_text
    )
    has_space = any(piece.piece == SPACE_MARK for piece in model.pieces)
    return keeps_text and is_bpe and trainer.byte_fallback and has_space and not spans_a_cut
