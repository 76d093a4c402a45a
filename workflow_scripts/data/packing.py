"""Packing: which document, from which token, how many, share a row of training.

A plan places pieces and copies no token. `best_fit` (best-fit decreasing) keeps documents whole
and apart, after arXiv:2404.10830; `concatenate` lays them end to end and cuts where a row ends, as
generic training scripts do, with attention across documents.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """A part of a document as placed in a row."""

    document: int
    """Index in the documents' file."""
    start: int
    """First token."""
    length: int
    """Tokens."""


Row = list[Piece]


def best_fit(lengths: Sequence[int] | np.ndarray, *, row_tokens: int, seed: int) -> list[Row]:
    """Every document whole in one row, the rows as full as best-fit decreasing makes them.

    A document longer than a row is cut into pieces of a row's length and a rest; these pieces do
    not see each other. Rows come in a random order, as best fit groups like lengths together.

    Args:
        lengths: tokens of each document, in order.
        row_tokens: length of a row.
        seed: decides the order of the rows.
    """
    pieces = [
        Piece(document, start, min(row_tokens, length - start))
        for document, length in enumerate(map(int, lengths))
        for start in range(0, length, row_tokens)
    ]
    pieces.sort(key=lambda piece: (-piece.length, piece.document, piece.start))
    rows: list[Row] = []
    rows_by_space: dict[int, list[Row]] = {}
    spaces: list[int] = []  # sorted keys of rows_by_space
    for piece in pieces:
        at = bisect.bisect_left(spaces, piece.length)
        if at == len(spaces):
            row: Row = []
            rows.append(row)
            space = row_tokens
        else:
            space = spaces[at]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space]
                spaces.pop(at)
        row.append(piece)
        rest = space - piece.length
        if rest:
            if rest not in rows_by_space:
                rows_by_space[rest] = []
                bisect.insort(spaces, rest)
            rows_by_space[rest].append(row)
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[at] for at in order]


def concatenate(lengths: Sequence[int] | np.ndarray, *, row_tokens: int, seed: int) -> list[Row]:
    """Documents in random order, end to end, cut wherever a row is full; the last row may be
    shorter.

    Args:
        lengths: tokens of each document, in order.
        row_tokens: length of a row.
        seed: decides the order of the documents.
    """
    rows: list[Row] = [[]]
    space = row_tokens
    for document in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        start, length = 0, int(lengths[document])
        while start < length:
            if space == 0:
                rows.append([])
                space = row_tokens
            taken = min(space, length - start)
            rows[-1].append(Piece(document, start, taken))
            start += taken
            space -= taken
    return [row for row in rows if row]


STRATEGIES = {"best_fit": best_fit, "concatenate": concatenate}


def plan_rows(
    lengths: Sequence[int] | np.ndarray,
    n_copies: Sequence[int] | np.ndarray,
    *,
    strategy: str,
    row_tokens: int,
    seed: int,
) -> list[Row]:
    """The rows of an epoch, each document placed as often as its source's weight says.

    Copies are pieces of their own, in one row or another; they do not see each other.

    Args:
        lengths, n_copies: (documents,) tokens of each document, and times it is placed.
        strategy: a name in `STRATEGIES`.
    """
    placed = np.repeat(np.arange(len(lengths)), n_copies)  # the document of each placement
    rows = STRATEGIES[strategy](np.asarray(lengths)[placed], row_tokens=row_tokens, seed=seed)
    documents = placed.tolist()
    return [[piece._replace(document=documents[piece.document]) for piece in row] for row in rows]


def attention_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of causal attention over `length` tokens within a window.

    Args:
        length: tokens of one attention segment.
        window: keys a query sees, itself included; None is full causal.
    """
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def attention_segments(row: Row, *, crosses_documents: bool) -> list[int]:
    """Lengths of the stretches of a row within which tokens see each other."""
    if crosses_documents:
        return [sum(piece.length for piece in row)]
    return [piece.length for piece in row]
