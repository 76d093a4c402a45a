"""Packing: which piece of which document shares a row of training with which others.

A plan places pieces and copies no token. `best_fit` (best-fit decreasing, for language models after
arXiv:2404.10830) keeps documents whole and apart; `concatenate` lays them end to end and cuts where
a row ends, as generic training scripts do; `one_a_row` packs nothing.

All of it works on columns: ten million documents are a matter of seconds.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Pieces whose places are worked out at once: what is made on the way stays in the cache.
BLOCK_PIECES = 1 << 18


class Piece(NamedTuple):
    """A part of a document as placed in a row."""

    document: int
    """Index in the documents' file."""
    start: int
    """First token."""
    length: int
    """Tokens."""
    n_context: int = 0
    """Leading tokens carried over from the piece before: seen, and masked from the loss. The
    document's first token (BOS) stands in place of the first of them."""


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
        """Every document as one piece.

        Args:
            lengths: (documents,) tokens of each.
        """
        length = np.asarray(lengths, dtype=np.int32)
        zeros = np.zeros(len(length), dtype=np.int32)
        return cls(np.arange(len(length)), zeros, length, zeros)

    @classmethod
    def listed(cls, pieces: Iterable[Piece]) -> Pieces:
        """Columns of single pieces."""
        columns = np.array(list(pieces), dtype=np.int64).reshape(-1, len(Piece._fields)).T
        return cls(columns[0], *(column.astype(np.int32) for column in columns[1:]))

    @property
    def n_pieces(self) -> int:
        return len(self.length)

    def take(self, indices: np.ndarray) -> Pieces:
        """The pieces at these places, in this order."""
        return Pieces(
            self.document[indices], self.start[indices], self.length[indices],
            self.n_context[indices],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of training as columns; an item is the list of a row's pieces."""

    pieces: Pieces
    """Of all rows, row after row."""
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
        ends = np.concatenate([[0], np.cumsum(self.pieces.length, dtype=np.int64)])
        return np.diff(ends[self.first_piece])

    @cached_property
    def row_of_piece(self) -> np.ndarray:
        """(pieces,) int64."""
        return np.repeat(np.arange(len(self)), np.diff(self.first_piece))

    def __len__(self) -> int:
        return len(self.first_piece) - 1

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]  # negative counts from the end, beyond is an IndexError
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
    """Every piece whole in one row, the rows as full as best-fit decreasing makes them.

    Each piece, longest first, goes to the fullest row that still holds it. Pieces of one length
    are all alike to that rule, so it runs over the histogram of lengths and moves rows in groups:
    the time grows with the number of distinct lengths, and placing the pieces is array arithmetic.

    Which of equally long pieces goes where is random, and so is the order of the rows, as best fit
    groups like lengths together.

    Args:
        pieces: none longer than a row.
        row_tokens: length of a row.
        seed: of both random orders.
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
    place = generator.permutation(n_rows)  # where a row comes to stand
    first_piece = np.zeros(n_rows + 1, dtype=np.int64)
    first_piece[place + 1] = n_pieces
    np.cumsum(first_piece, out=first_piece)

    source = np.empty(pieces.n_pieces, dtype=order.dtype)  # by place, the piece that stands there
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
    """Indices by falling length, equals in random order."""
    assert len(lengths) < 2**31, len(lengths)
    shuffled = np.arange(len(lengths), dtype=np.int32)
    generator.shuffle(shuffled)
    # One integer a piece, all different: NumPy's fast sorts are not stable.
    keys = -lengths[shuffled].astype(np.int64) << 32
    keys |= np.arange(len(lengths))
    keys.sort()
    return shuffled[keys & 0xFFFFFFFF]


class _Placements(NamedTuple):
    """Steps of best fit, in order, (placements,) int64 each: one length into a range of rows."""

    first_row: np.ndarray
    n_rows: np.ndarray
    n_each: np.ndarray
    """Pieces of that length put into each of the rows."""
    n_before: np.ndarray
    """Pieces each of the rows held already."""


def _place_by_length(counts: np.ndarray, row_tokens: int) -> _Placements:
    """Best-fit decreasing over a histogram.

    Rows that hold the same lengths are a group, a range of row numbers. The tightest row for a
    length stays the tightest while another of that length fits, so a row takes all it holds at
    once, and so does every row of its group.

    Args:
        counts: pieces of each length, from length 0, of which there is none.
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
                # The second round is the one row that takes what is left, where there is such.
                if n_taken and n_here and n:
                    placements.append((first_row, n_here, n_taken, n_before))
                    keep(space - n_taken * length, first_row, n_here, n_before + n_taken)
                    first_row, n, left = first_row + n_here, n - n_here, left - n_here * n_taken
            if n:
                keep(space, first_row, n, n_before)
    return _Placements(*np.array(placements, dtype=np.int64).reshape(-1, 4).T)


def concatenate(pieces: Pieces, *, row_tokens: int, seed: int) -> Rows:
    """Documents in random order, end to end, cut wherever a row is full; the last row may be
    shorter.

    Args:
        pieces: whole documents.
        row_tokens: length of a row.
        seed: decides the order of the documents.
    """
    order = np.random.default_rng(seed).permutation(pieces.n_pieces)
    ends = np.cumsum(pieces.length[order], dtype=np.int64)
    n_tokens = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(0, n_tokens, row_tokens)
    begins = np.concatenate([cuts, ends[:-1]])
    begins.sort(kind="stable")  # two sorted runs: a merge
    begins = begins[np.diff(begins, prepend=-1) > 0]
    at = np.searchsorted(ends, begins, side="right")  # whose document begins or goes on there
    placed = pieces.take(order[at])
    start = begins - (ends - pieces.length[order])[at]
    length = np.diff(begins, append=n_tokens)
    placed = Pieces(
        placed.document, start.astype(np.int32), length.astype(np.int32), placed.n_context
    )
    return Rows(placed, np.append(np.searchsorted(begins, cuts), len(begins)))


def one_a_row(pieces: Pieces, *, row_tokens: int, seed: int) -> Rows:
    """Every piece a row by itself, in random order; what shares a micro-batch is padded.

    Args:
        pieces: none longer than `row_tokens`.
        seed: decides the order.
    """
    order = np.random.default_rng(seed).permutation(pieces.n_pieces)
    return Rows(pieces.take(order), np.arange(pieces.n_pieces + 1))


STRATEGIES = {"best_fit": best_fit, "concatenate": concatenate, "none": one_a_row}
