"""Pieces: held-out documents, cut so that every link of the chain can score them alike.

llama.cpp does not apply a Mistral model's sliding window, so scores are comparable only on text no
longer than the window. A longer document becomes overlapping pieces. Each begins with the
document's first token (BOS) and carries half a piece of context that is not scored again; every
supervised token is scored exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.tokens.documents import Document


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of tokens and the positions whose token is scored."""

    document: int
    """Index of the document that it is cut from."""
    input_ids: np.ndarray
    """(n_tokens,) int32."""
    scored: np.ndarray
    """(n_scored,) int64 positions in the piece, ascending, none 0: a token is predicted from those
    before it."""

    @property
    def targets(self) -> np.ndarray:
        """(n_scored,) int64 ids of the scored tokens."""
        return self.input_ids[self.scored].astype(np.int64)


def cut(documents: Iterable[Document], *, piece_tokens: int | None) -> Iterator[Piece]:
    """Cut all documents into pieces, in order; a piece without a supervised token is left out.

    Args:
        documents: rendered conversations.
        piece_tokens: longest piece, at least 4; None keeps documents whole.
    """
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
    """Start and end of each piece of a document, and its number of context tokens: these were
    scored in an earlier piece, and the first of them is replaced by BOS.

    The last piece is only as long as needed: it carries no more context than the others.

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
    """Length of pieces that every link scores alike: the context that llama.cpp computes correctly.

    Args:
        wanted: a shorter length, if any.
    """
    limit = facts.served_context_tokens
    return limit if wanted is None else min(limit, wanted)


def longest(pieces: Sequence[Piece]) -> int:
    """Tokens of the longest piece, the size that a key-value cache needs."""
    return max((len(piece.input_ids) for piece in pieces), default=1)
