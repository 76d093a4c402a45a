"""Splitting: where to cut a document that is longer than a row into pieces.

Every token is new in exactly one piece. Each later piece begins with the last tokens before it, as
context that the loss does not count. This is an approximation: in the whole document an answer sees
everything before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from workflow_scripts.tokens.token_texts import is_control, token_bytes

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.base import Tokenizer

Cut = Literal["turn", "sentence", "token"]
# Minimum fraction of the room for new tokens that a piece fills. Packing uses the rest for other
# documents; the cost of a short piece is one more piece with its context. A cut between turns does
# the least harm, so it may double the number of pieces at worst. Sentences end every few lines, so
# the last quarter has an end: a third more pieces at worst.
FILLED_AT_TURN = 1 / 2
FILLED_AT_SENTENCE = 3 / 4

CLOSING = "\"'”’»)\\]}）」』】》"
SPACED_END = re.compile(rf"[.!?…؟۔।][{CLOSING}]*$")  # an end only if a space follows: not in `3.14`
WIDE_END = re.compile(rf"[。！？｡][{CLOSING}]*$")  # written without spaces
CLOSES = re.compile(rf"[{CLOSING}]+$")
CONTINUES = re.compile(rf"[{CLOSING}.!?…。！？｡]")


class Part(NamedTuple):
    """A piece of one document."""

    start: int
    """First token."""
    length: int
    """Tokens, including the context."""
    n_context: int
    """Leading tokens that earlier pieces contain too."""


def split(
    input_ids: np.ndarray,
    *,
    row_tokens: int,
    overlap_tokens: int,
    turn_ends: np.ndarray,
    sentence_ends: np.ndarray,
) -> tuple[list[Part], list[Cut]]:
    """Return the pieces of a document in order, and the kind of each cut between two pieces.

    A piece ends at the last turn end that leaves it at least half full of new tokens; else at the
    last sentence end in its last quarter; else at the row's end.

    Args:
        input_ids: (tokens,) of the document.
        row_tokens: maximum length of a piece.
        overlap_tokens: context of each piece after the first: at least 1, because BOS replaces its
            first token, and at most half of a row.
        turn_ends, sentence_ends: ascending; the number of tokens before each possible cut.
    Raises:
        ValueError: `overlap_tokens` is outside these bounds.
    """
    if not 1 <= overlap_tokens <= row_tokens // 2:
        raise ValueError(f"overlap_tokens: found {overlap_tokens}, row_tokens {row_tokens}")
    parts: list[Part] = []
    kinds: list[Cut] = []
    n_placed = n_context = 0
    while (room := row_tokens - n_context) < len(input_ids) - n_placed:
        end = n_placed + room
        kind: Cut = "token"
        candidates: tuple[tuple[np.ndarray, float, Cut], ...] = (
            (turn_ends, FILLED_AT_TURN, "turn"),
            (sentence_ends, FILLED_AT_SENTENCE, "sentence"),
        )
        for ends, filled, name in candidates:
            at = int(np.searchsorted(ends, n_placed + room, side="right")) - 1
            if at >= 0 and ends[at] - n_placed >= filled * room:
                end, kind = int(ends[at]), name
                break
        parts.append(Part(n_placed - n_context, end - n_placed + n_context, n_context))
        kinds.append(kind)
        n_placed, n_context = end, overlap_tokens
    start = n_placed - n_context
    parts.append(Part(start, len(input_ids) - start, n_context))
    return parts, kinds


@dataclass(frozen=True, eq=False)
class TokenEnds:
    """Properties of a vocabulary's tokens that show where turns and sentences end.

    The arrays are (vocabulary,) bool. Ends are recognized from neighbouring tokens, without a list
    of abbreviations: `e.g. this` counts as an end.
    """

    turn_end_id: int
    """EOS, which closes every answer."""
    ends_sentence: np.ndarray
    """Ends a sentence if a space follows."""
    ends_wide_sentence: np.ndarray
    """Ends a sentence unless the next token `continues` the end."""
    closes: np.ndarray
    """Consists of closing quotes and brackets, which belong to the sentence before them."""
    continues: np.ndarray
    """Begins with a closing quote or bracket, or with more punctuation."""
    begins_with_space: np.ndarray
    ends_line: np.ndarray
    begins_with_line_end: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenEnds:
        """Compute the properties from a vocabulary.

        Args:
            tokenizer: mistral-common's, SentencePiece or tekken.
        """
        texts = [
            ""
            if is_control(tokenizer, token_id)
            else token_bytes(tokenizer, token_id).decode(errors="replace")
            for token_id in range(tokenizer.n_words)
        ]
        return cls(
            turn_end_id=tokenizer.eos_id,
            ends_sentence=np.array([bool(SPACED_END.search(text)) for text in texts]),
            ends_wide_sentence=np.array([bool(WIDE_END.search(text)) for text in texts]),
            closes=np.array([bool(CLOSES.match(text)) for text in texts]),
            continues=np.array([bool(CONTINUES.match(text)) for text in texts]),
            begins_with_space=np.array([text.startswith((" ", "\t")) for text in texts]),
            ends_line=np.array([text.endswith("\n") for text in texts]),
            begins_with_line_end=np.array([text.startswith("\n") for text in texts]),
        )

    def turn_ends(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the number of tokens before each end of an answer.

        Args:
            input_ids: (tokens,) of one document.
        """
        return np.flatnonzero(input_ids == self.turn_end_id) + 1

    def sentence_ends(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the number of tokens before each end of a sentence or line in a document.

        Args:
            input_ids: (tokens,) of one document.
        """
        before, after = input_ids[:-1], input_ids[1:]
        is_end = (
            (self._ends(self.ends_sentence, before) & self.begins_with_space[after])
            | (self._ends(self.ends_wide_sentence, before) & ~self.continues[after])
            | (self.ends_line[before] & ~self.begins_with_line_end[after])
        )
        return np.flatnonzero(is_end) + 1

    def _ends(self, ends_sentence: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Return True for each token that ends a sentence or closes one that ended just before."""
        is_end = ends_sentence[token_ids]
        is_end[1:] |= is_end[:-1] & self.closes[token_ids[1:]]
        return is_end
