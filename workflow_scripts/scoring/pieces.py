"""Pieces: held-out documents cut so that every link of the chain can score them alike.

llama.cpp does not apply a Mistral's sliding window, so only text no longer than the window
compares. A longer document becomes overlapping pieces: each begins with the document's first token
(BOS), carries half a piece of context that is not scored again, and no supervised token is scored
twice or left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.tokens.documents import Document

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of tokens and the positions whose token is scored."""

    document: int
    """Index of the document it is cut from."""
    input_ids: np.ndarray
    """(n_tokens,) int32."""
    scored: np.ndarray
    """(n_scored,) int64 positions in the piece, ascending, none 0: each token is predicted from
    those
    before it."""


def cut(documents: Iterable[Document], *, piece_tokens: int | None) -> Iterator[Piece]:
    """The pieces of all documents, in order; stretches without a supervised token are left out.

    Args:
        documents: rendered conversations.
        piece_tokens: longest piece, at least 4; None keeps documents whole.
    """
    import numpy as np

    for number, document in enumerate(documents):
        is_scored = document.is_supervised.copy()
        is_scored[:1] = False
        for start, end, n_context in stretches(len(document.input_ids), piece_tokens):
            scored = np.flatnonzero(is_scored[start + n_context : end]) + n_context
            if len(scored):
                tokens = document.input_ids[start:end]
                if start:
                    tokens = np.concatenate([document.input_ids[:1], tokens[1:]])
                yield Piece(number, tokens, scored)


def stretches(n_tokens: int, piece_tokens: int | None) -> Iterator[tuple[int, int, int]]:
    """Where a document is cut: start and end of each piece, and how many of its tokens are context
    that an earlier piece has scored. Of these the first stands for the BOS in front.

    The last piece is as long as it need be: it carries no more context than the others.

    Args:
        n_tokens: of the document.
        piece_tokens: as in `cut`.
    """
    longest = n_tokens if piece_tokens is None else min(piece_tokens, n_tokens)
    end = longest
    yield 0, end, 0
    while end < n_tokens:
        scored_from = end
        end = min(n_tokens, end + longest - longest // 2)
        start = scored_from - longest // 2
        yield start, end, scored_from - start


def comparable_tokens(facts: ModelShape, wanted: int | None) -> int:
    """Length of pieces that every link scores alike: what llama.cpp honours, or less if wanted."""
    limit = facts.served_context_tokens
    return limit if wanted is None else min(limit, wanted)


def longest(pieces: Sequence[Piece]) -> int:
    """Tokens of the longest piece: a key-value cache need hold no more."""
    return max((len(piece.input_ids) for piece in pieces), default=1)
