"""Packing: which pieces of documents share a row of training.

A plan places pieces and copies no token. `best_fit` (best-fit decreasing, for language models as in
arXiv:2404.10830) keeps documents whole and separate; `concatenate` places them end to end and cuts
at each row's end, as generic training scripts do; `one_a_row` does not pack.

All functions work on columns: ten million documents take seconds.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Pieces placed at a time, so that intermediate arrays stay in the CPU cache.
BLOCK_PIECES = 1 << 18


class Piece(NamedTuple):
    """A part of a document as placed in a row."""

    document: int
    """Index in the file of documents."""
    start: int
    """First token."""
    length: int
    """Tokens."""
    n_context: int = 0
    """Leading tokens repeated from the previous piece: visible, but masked from the loss. The
    document's first token (BOS) replaces the first of them."""


Row = list[Piece]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces as columns, (pieces,) each."""

    document: np.ndarray
    """int64."""
    start: np.ndarray
    """int32."""
    length: np.ndarray
    """int32, at least 1."""
    n_context: np.ndarray
    """int32."""

    @classmethod
    def whole(cls, lengths: Sequence[int] | np.ndarray) -> Pieces:
        """Make every document one piece.

        Args:
            lengths: (documents,) tokens of each document.
        """
        length = np.asarray(lengths, dtype=np.int32)
        zeros = np.zeros(len(length), dtype=np.int32)
        return cls(np.arange(len(length)), zeros, length, zeros)

    @classmethod
    def listed(cls, pieces: Iterable[Piece]) -> Pieces:
        """Convert single pieces to columns."""
        columns = np.array(list(pieces), dtype=np.int64).reshape(-1, len(Piece._fields)).T
        return cls(columns[0], *(column.astype(np.int32) for column in columns[1:]))

    @property
    def n_pieces(self) -> int:
        return len(self.length)

    def take(self, indices: np.ndarray) -> Pieces:
        """Return the pieces at the indices, in that order."""
        return Pieces(*(getattr(self, name)[indices] for name in Piece._fields))

    def joined(self, other: Pieces) -> Pieces:
        """Return these pieces followed by others."""
        names = Piece._fields
        return Pieces(
            *(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names)
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of training as columns; an item is one row as a list of pieces."""

    pieces: Pieces
    """The pieces of all rows, row by row."""
    first_piece: np.ndarray
    """(rows + 1,) int64: a row's pieces are `first_piece[row]` up to `first_piece[row + 1]`."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Rows:
        """Rows from lists of pieces."""
        rows = list(rows)
        pieces = Pieces.listed(piece for row in rows for piece in row)
        return cls(pieces, np.cumsum([0, *map(len, rows)]))

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """(rows,) int64, tokens of each row."""
        return self.sum_pieces(self.pieces.length)

    def sum_pieces(self, values: np.ndarray) -> np.ndarray:
        """Sum (pieces,) integers over each row; returns (rows,) int64."""
        ends = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(ends[self.first_piece])

    @cached_property
    def row_of_piece(self) -> np.ndarray:
        """(pieces,) int64, the row of each piece."""
        return np.repeat(np.arange(len(self)), np.diff(self.first_piece))

    def __len__(self) -> int:
        return len(self.first_piece) - 1

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]  # a negative index counts from the end
        stretch = slice(self.first_piece[index], self.first_piece[index + 1])
        columns = (getattr(self.pieces, name)[stretch].tolist() for name in Piece._fields)
        return list(map(Piece, *columns))

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return list(self) == list(other)


def best_fit(pieces: Pieces, *, row_tokens: int, seed: int) -> Rows:
    """Pack pieces, each whole, into rows by best-fit decreasing.

    Each piece, longest first, goes into the fullest row that still has room for it. This rule does
    not distinguish pieces of equal length, so it runs over the histogram of lengths and moves rows
    in groups. The time depends on the number of distinct lengths; pieces are placed by array
    arithmetic.

    Pieces of equal length are placed in random order. The order of the rows is random too, because
    best fit puts similar lengths next to each other.

    Args:
        pieces: none longer than a row.
        row_tokens: length of a row.
        seed: seed of both random orders.
    Source: Krell et al. 2021, arXiv:2107.02027 §3 (packing over the histogram); Ding et al. 2024,
        arXiv:2404.10830 (best-fit decreasing, and the case against truncation).
    """
    assert pieces.length.max(initial=0) <= row_tokens, "a piece is longer than a row"
    generator = np.random.default_rng(seed)
    order = _longest_first(pieces.length, generator)
    placements = _place_by_length(np.bincount(pieces.length), row_tokens)
    n_rows = int((placements.first_row + placements.n_rows).max(initial=0))

    # Pieces of each row: every placement adds `n_each` to a range of rows.
    steps = np.zeros(n_rows + 1, dtype=np.int64)
    np.add.at(steps, placements.first_row, placements.n_each)
    np.subtract.at(steps, placements.first_row + placements.n_rows, placements.n_each)
    n_pieces = np.cumsum(steps)[:-1]
    place = generator.permutation(n_rows)  # the place of each row
    first_piece = np.zeros(n_rows + 1, dtype=np.int64)
    first_piece[place + 1] = n_pieces
    np.cumsum(first_piece, out=first_piece)

    source = np.empty(pieces.n_pieces, dtype=order.dtype)  # piece at each place
    ends = np.cumsum(placements.n_rows * placements.n_each)
    for start in range(0, pieces.n_pieces, BLOCK_PIECES):
        numbers = np.arange(start, min(pieces.n_pieces, start + BLOCK_PIECES))
        at = np.searchsorted(ends, numbers, side="right")  # the placement of each
        n_each = placements.n_each[at]
        within = numbers - (ends[at] - placements.n_rows[at] * n_each)
        row, slot = placements.first_row[at] + within // n_each, within % n_each
        source[first_piece[place[row]] + placements.n_before[at] + slot] = order[numbers]
    return Rows(pieces.take(source), first_piece)


def _longest_first(lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return indices by decreasing length, equal lengths in random order."""
    assert len(lengths) < 2**31, len(lengths)
    shuffled = np.arange(len(lengths), dtype=np.int32)
    generator.shuffle(shuffled)
    # One distinct integer per piece, because NumPy's fast sorts are not stable.
    keys = -lengths[shuffled].astype(np.int64) << 32
    keys |= np.arange(len(lengths))
    keys.sort()
    return shuffled[keys & 0xFFFFFFFF]


class _Placements(NamedTuple):
    """Steps of best fit in order, (placements,) int64: one length into a range of rows."""

    first_row: np.ndarray
    n_rows: np.ndarray
    n_each: np.ndarray
    """Pieces of the length put into each row."""
    n_before: np.ndarray
    """Pieces already in each row."""


def _place_by_length(counts: np.ndarray, row_tokens: int) -> _Placements:
    """Run best-fit decreasing on a histogram of lengths.

    Rows with the same lengths form a group, a range of row numbers. The tightest row for a length
    stays the tightest while another piece of that length fits, so each row of a group is filled in
    one step.

    Args:
        counts: number of pieces of each length, from length 0 (none).
    """
    placements: list[tuple[int, int, int, int]] = []
    groups: dict[int, list[tuple[int, int, int]]] = {}  # by free tokens: first row, rows, pieces
    spaces: list[int] = []  # the sorted keys of `groups`
    n_rows = 0

    def keep(space: int, first_row: int, n: int, n_pieces: int) -> None:
        if space not in groups:
            groups[space] = []
            bisect.insort(spaces, space)
        groups[space].append((first_row, n, n_pieces))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect.bisect_left(spaces, length)
            if at == len(spaces):
                space = row_tokens
                first_row, n, n_before = n_rows, -(-left // (row_tokens // length)), 0
                n_rows += n
            else:
                space = spaces[at]
                first_row, n, n_before = groups[space].pop()
                if not groups[space]:
                    del groups[space], spaces[at]
            n_each = space // length
            n_full = min(n, left // n_each)
            for n_taken, n_here in ((n_each, n_full), (left - n_full * n_each, 1)):
                # The second round is the one row, if any, that takes the remainder.
                if n_taken and n_here and n:
                    placements.append((first_row, n_here, n_taken, n_before))
                    keep(space - n_taken * length, first_row, n_here, n_before + n_taken)
                    first_row, n, left = first_row + n_here, n - n_here, left - n_here * n_taken
            if n:
                keep(space, first_row, n, n_before)
    return _Placements(*np.array(placements, dtype=np.int64).reshape(-1, 4).T)


def concatenate(pieces: Pieces, *, row_tokens: int, seed: int) -> Rows:
    """Place documents end to end in random order, cut where a row is full; the last may be short.

    Args:
        pieces: whole documents.
        row_tokens: length of a row.
        seed: seed of the order of the documents.
    """
    order = np.random.default_rng(seed).permutation(pieces.n_pieces)
    ends = np.cumsum(pieces.length[order], dtype=np.int64)
    n_tokens = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(0, n_tokens, row_tokens)
    begins = np.concatenate([cuts, ends[:-1]])
    begins.sort(kind="stable")  # two sorted runs: a merge
    begins = begins[np.diff(begins, prepend=-1) > 0]
    at = np.searchsorted(ends, begins, side="right")  # the document that begins or continues there
    placed = pieces.take(order[at])
    start = begins - (ends - pieces.length[order])[at]
    length = np.diff(begins, append=n_tokens)
    placed = Pieces(
        placed.document, start.astype(np.int32), length.astype(np.int32), placed.n_context
    )
    return Rows(placed, np.append(np.searchsorted(begins, cuts), len(begins)))


def one_a_row(pieces: Pieces, *, row_tokens: int, seed: int) -> Rows:
    """Make every piece a row, in random order; rows of a micro-batch are padded in training.

    Args:
        pieces: none longer than `row_tokens`.
        seed: seed of the order.
    """
    order = np.random.default_rng(seed).permutation(pieces.n_pieces)
    return Rows(pieces.take(order), np.arange(pieces.n_pieces + 1))


STRATEGIES = {"best_fit": best_fit, "concatenate": concatenate, "none": one_a_row}
