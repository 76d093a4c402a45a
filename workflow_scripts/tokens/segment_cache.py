"""Text to token ids as mistral-common does it, each stretch of text encoded once and remembered.

A tokenizer that never joins what stands left and right of a place gives the same ids whether the
text is cut there or not. Cut at such places, chats repeat a vocabulary of words: most are looked
up, and the library is asked for the rest. Where the tokenizer's own file does not prove that the
cuts are safe, and where a text could fool them, the library is given the text whole.

Ids travel as the bytes of int32, in the machine's order: joining them is one call, and numpy reads
the result without a copy.
"""

from __future__ import annotations

import itertools
import operator
import re
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

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

# About 120 MB a process for text; a segment of characters that have no piece may take 1 kB.
MAX_SEGMENTS = 600_000
MAX_SEGMENT_CHARACTERS = 48  # longer ones (links, hashes, lines without a space) rarely come again


class SegmentCache:
    """Token ids by segment, in two halves: when the newer one is full it becomes the older.

    What is asked for again comes back from the older half before that is dropped, so that common
    words stay; keeping the very order of use would cost more on every look-up.

    Args:
        encode: token ids of each of several segments.
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
        """Token ids of the segments of several texts; what is new is encoded in one call.

        Each segment is looked up once: that is most of the time.
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
        tokenizer: of the library; it stays as it is.
        max_segments: see `SegmentCache`.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_segments: int = MAX_SEGMENTS) -> None:
        from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece_tokenizer
        from mistral_common.tokens.tokenizers.tekken import is_tekkenizer

        self._library_encode = tokenizer.encode
        library: Any = tokenizer  # `_model` is of its classes, not of their base
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
        """Whether the tokenizer is one whose texts can be cut."""
        return self._cut is not None

    def encode(self, text: str) -> bytes:
        """Token ids of a text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[bytes]:
        """Token ids of many texts, which is faster than one by one."""
        if self._cut is None:
            return list(map(self.encode_whole, texts))
        segments = [[] if SPACE_MARK in text else self._cut(text) for text in texts]
        return [
            self.encode_whole(text) if SPACE_MARK in text else b"".join(found)
            for text, found in zip(texts, self._cache.look_up(segments), strict=True)
        ]

    def encode_whole(self, text: str) -> bytes:
        """The library's own encoding of a text in one piece."""
        return array("i", self._library_encode(text, bos=False, eos=False)).tobytes()

    def _encode_segments(self, segments: Sequence[str]) -> list[bytes]:
        """Segments of `cut_sentencepiece`.

        The library puts a space before every text: the segment's own, or, before a line end, one
        to take off again.
        """
        texts = [segment[1:] if segment[0] == " " else segment for segment in segments]
        encoded = self._library_model.encode(texts, num_threads=1)
        return [
            # A space with nothing behind it is no text to the library: no ids.
            array("i", ids[segment[0] == "\n" :] or self._space_id).tobytes()
            for segment, ids in zip(segments, encoded, strict=True)
        ]


def cut_sentencepiece(text: str) -> list[str]:
    """A text in segments: words, a leading space understood; or what begins with a line end, or
    with the spaces as they are, where a text has more than one in a row.
    """
    if not text:
        return []
    spaced = text.replace("\n", " \n")
    if spaced[0] == " " or spaced[-1] == " " or "  " in spaced:
        return SENTENCEPIECE_SEGMENT.findall(" " + text)
    return spaced.split(" ")  # five times as fast


def _is_cut_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a SentencePiece model's own file says that SENTENCEPIECE_SEGMENT cuts safely.

    That is: byte-pair merges, whose outcome left and right of a place that no piece spans is
    independent; every space kept as it is and one put before the text; unknown characters as
    bytes, one by one.
    """
    from sentencepiece import sentencepiece_model_pb2

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
