from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts.packing.packing import (
    STRATEGIES,
    Piece,
    Pieces,
    Rows,
    best_fit,
    concatenate,
    one_a_row,
)

lengths_that_fit = st.lists(st.integers(1, 64), max_size=120)
few_lengths = st.lists(st.sampled_from([1, 2, 7, 16, 31, 33, 50, 64]), max_size=120)
lengths_of_any_kind = lengths_that_fit | few_lengths
longer_documents = st.lists(st.integers(1, 300), max_size=120)
row_lengths = st.integers(64, 256)
seeds = st.integers(0, 2**32 - 1)
strategies = st.sampled_from(sorted(STRATEGIES))


def plan(strategy, lengths, row_tokens, seed=0):
    return STRATEGIES[strategy](Pieces.whole(lengths), row_tokens=row_tokens, seed=seed)


def naive_best_fit(lengths, row_tokens):
    """Fill of each row: each document, longest first, into the fullest row with room."""
    fills = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, fill in enumerate(fills) if fill + length <= row_tokens]
        if fitting:
            fills[max(fitting, key=fills.__getitem__)] += length
        else:
            fills.append(length)
    return fills


@given(lengths=lengths_of_any_kind, row_tokens=row_lengths, seed=seeds, strategy=strategies)
def test_every_token_is_placed_exactly_once(lengths, row_tokens, seed, strategy):
    rows = plan(strategy, lengths, row_tokens, seed)
    placed = Counter(
        (piece.document, token)
        for row in rows
        for piece in row
        for token in range(piece.start, piece.start + piece.length)
    )
    tokens = ((document, token) for document, n in enumerate(lengths) for token in range(n))
    assert placed == Counter(tokens)


@given(lengths=lengths_of_any_kind, row_tokens=row_lengths, seed=seeds, strategy=strategies)
def test_no_row_is_empty_or_longer_than_a_row(lengths, row_tokens, seed, strategy):
    rows = plan(strategy, lengths, row_tokens, seed)
    assert all(0 < fill <= row_tokens for fill in rows.n_tokens)
    assert all(piece.length > 0 for row in rows for piece in row)
    assert rows.n_tokens.tolist() == [sum(piece.length for piece in row) for row in rows]


@given(lengths=lengths_of_any_kind, row_tokens=row_lengths, seed=seeds, strategy=strategies)
def test_a_seed_decides_the_plan(lengths, row_tokens, seed, strategy):
    rows = plan(strategy, lengths, row_tokens, seed)
    assert plan(strategy, np.array(lengths, int), row_tokens, seed) == rows


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_another_seed_gives_another_order(strategy):
    lengths = list(range(1, 65))
    plans = [plan(strategy, lengths, 64, seed) for seed in range(5)]
    assert all(one != other for at, one in enumerate(plans) for other in plans[:at])


@given(lengths=lengths_of_any_kind, row_tokens=row_lengths, seed=seeds)
def test_every_document_is_whole_in_exactly_one_row(lengths, row_tokens, seed):
    rows = plan("best_fit", lengths, row_tokens, seed)
    placed = Counter(piece for row in rows for piece in row)
    assert placed == Counter(Piece(document, 0, length) for document, length in enumerate(lengths))


@given(lengths=lengths_of_any_kind, row_tokens=row_lengths, seed=seeds)
def test_best_fit_fills_rows_as_the_naive_algorithm_does(lengths, row_tokens, seed):
    rows = plan("best_fit", lengths, row_tokens, seed)
    assert sorted(rows.n_tokens) == sorted(naive_best_fit(lengths, row_tokens))


@given(lengths=lengths_that_fit, seed=seeds)
def test_no_two_rows_of_best_fit_would_fit_into_one(lengths, seed):
    emptiest = sorted(plan("best_fit", lengths, 100, seed).n_tokens)[:2]
    assert len(emptiest) < 2 or sum(emptiest) > 100


def test_more_documents_than_a_block_are_placed_once_each():
    lengths = np.random.default_rng(0).integers(1, 90, size=(1 << 18) + 1000)
    rows = plan("best_fit", lengths, 100)
    pieces = rows.pieces
    assert np.array_equal(np.sort(pieces.document), np.arange(len(lengths)))
    assert np.array_equal(pieces.length, lengths[pieces.document])
    assert rows.n_tokens.max() == 100
    assert rows.n_tokens.mean() > 99.9


def test_best_fit_shuffles_rows_and_documents_of_equal_length():
    lengths = [60] * 50 + [40] * 50 + list(range(1, 21))
    rows = plan("best_fit", lengths, 100)
    n_pieces = [len(row) for row in rows]
    assert n_pieces != sorted(n_pieces)  # without shuffling, rows of one long document come first
    longest = [row[0].document for row in rows if row[0].length == 60]
    assert longest != sorted(longest)
    distances = {row[1].document - row[0].document for row in rows if len(row) == 2}
    assert len(distances) > 10  # in file order, all would be 50


@given(lengths=longer_documents, row_tokens=st.integers(16, 256), seed=seeds)
def test_concatenate_fills_every_row_but_the_last(lengths, row_tokens, seed):
    fills = plan("concatenate", lengths, row_tokens, seed).n_tokens
    assert all(fill == row_tokens for fill in fills[:-1])
    assert len(fills) == -(-sum(lengths) // row_tokens)
    assert fills.sum() == sum(lengths)


@given(lengths=longer_documents, row_tokens=st.integers(16, 256), seed=seeds)
def test_concatenate_keeps_each_documents_tokens_contiguous(lengths, row_tokens, seed):
    rows = plan("concatenate", lengths, row_tokens, seed)
    next_token = {}
    order = []
    for piece in (piece for row in rows for piece in row):
        assert piece.start == next_token.get(piece.document, 0)
        next_token[piece.document] = piece.start + piece.length
        order.append(piece.document)
    assert next_token == dict(enumerate(lengths))
    changes = [document for at, document in enumerate(order) if order[at - 1 : at] != [document]]
    assert len(changes) == len(set(order))


def test_without_packing_a_row_holds_one_piece():
    rows = one_a_row(Pieces.whole([5, 9, 2]), row_tokens=16, seed=0)
    assert sorted(map(tuple, rows)) == [
        (Piece(0, 0, 5),),
        (Piece(1, 0, 9),),
        (Piece(2, 0, 2),),
    ]


@given(lengths=lengths_that_fit, seed=seeds)
def test_pieces_keep_their_start_and_context_wherever_they_are_placed(lengths, seed):
    pieces = [Piece(7 * at, at % 3, length, n_context=at % 2) for at, length in enumerate(lengths)]
    for strategy in (best_fit, one_a_row):
        rows = strategy(Pieces.listed(pieces), row_tokens=80, seed=seed)
        assert Counter(piece for row in rows for piece in row) == Counter(pieces)


def test_a_piece_longer_than_a_row_fails_an_assertion():
    with pytest.raises(AssertionError, match="longer than a row"):
        best_fit(Pieces.whole([10, 17]), row_tokens=16, seed=0)


listed_rows = st.lists(
    st.lists(
        st.builds(Piece, *[st.integers(0, 2**31 - 1)] * 2, st.integers(1, 99), st.integers(0, 9)),
        min_size=1,
        max_size=4,
    ),
    max_size=5,
)


@given(listed=listed_rows)
def test_rows_are_a_sequence_of_lists_of_pieces(listed):
    rows = Rows.of(listed)
    assert list(rows) == listed
    assert [rows[at] for at in range(-len(listed), 0)] == listed
    assert len(rows) == len(listed)
    assert rows.row_of_piece.tolist() == [at for at, row in enumerate(listed) for _ in row]
    with pytest.raises(IndexError):
        rows[len(listed)]
    assert rows == Rows.of(listed)
    assert rows != Rows.of([*listed, [Piece(0, 0, 1)]])


def test_the_seed_decides_the_order_in_concatenate():
    rows = concatenate(Pieces.whole([4] * 20), row_tokens=16, seed=3)
    order = [piece.document for row in rows for piece in row]
    assert order == np.random.default_rng(3).permutation(20).tolist()
