from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflow_scripts.data.packing import (
    STRATEGIES,
    Piece,
    attention_pairs,
    attention_segments,
    best_fit,
    concatenate,
)

lengths_of_any_kind = st.lists(st.integers(0, 300), max_size=120)
lengths_that_fit = st.lists(st.integers(1, 64), min_size=1, max_size=120)
seeds = st.integers(0, 2**32 - 1)
strategies = st.sampled_from(sorted(STRATEGIES))


def naive_best_fit(lengths, row_tokens):
    """Fill of each row: every document, longest first, into the fullest row that still holds it."""
    fills = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, fill in enumerate(fills) if fill + length <= row_tokens]
        if fitting:
            fills[max(fitting, key=fills.__getitem__)] += length
        else:
            fills.append(length)
    return fills


def fills_of(rows):
    return [sum(piece.length for piece in row) for row in rows]


@given(
    lengths=lengths_of_any_kind, row_tokens=st.integers(16, 256), seed=seeds, strategy=strategies
)
def test_every_token_is_placed_exactly_once(lengths, row_tokens, seed, strategy):
    rows = STRATEGIES[strategy](lengths, row_tokens=row_tokens, seed=seed)
    placed = Counter(
        (piece.document, token)
        for row in rows
        for piece in row
        for token in range(piece.start, piece.start + piece.length)
    )
    tokens = ((document, token) for document, n in enumerate(lengths) for token in range(n))
    assert placed == Counter(tokens)


@given(
    lengths=lengths_of_any_kind, row_tokens=st.integers(16, 256), seed=seeds, strategy=strategies
)
def test_no_row_is_empty_or_longer_than_a_row(lengths, row_tokens, seed, strategy):
    rows = STRATEGIES[strategy](lengths, row_tokens=row_tokens, seed=seed)
    assert all(0 < fill <= row_tokens for fill in fills_of(rows))
    assert all(piece.length > 0 for row in rows for piece in row)


@given(
    lengths=lengths_of_any_kind, row_tokens=st.integers(16, 256), seed=seeds, strategy=strategies
)
def test_a_seed_decides_the_plan(lengths, row_tokens, seed, strategy):
    plan = STRATEGIES[strategy]
    rows = plan(lengths, row_tokens=row_tokens, seed=seed)
    assert plan(np.array(lengths, int), row_tokens=row_tokens, seed=seed) == rows


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_another_seed_is_another_order(strategy):
    lengths = list(range(1, 65))
    plans = [STRATEGIES[strategy](lengths, row_tokens=64, seed=seed) for seed in range(5)]
    assert all(one != other for at, one in enumerate(plans) for other in plans[:at])


@given(lengths=lengths_that_fit, row_tokens=st.integers(64, 256), seed=seeds)
def test_every_document_lies_whole_in_exactly_one_row(lengths, row_tokens, seed):
    rows = best_fit(lengths, row_tokens=row_tokens, seed=seed)
    placed = Counter(piece for row in rows for piece in row)
    assert placed == Counter(Piece(document, 0, length) for document, length in enumerate(lengths))


@given(lengths=lengths_of_any_kind, row_tokens=st.integers(16, 64), seed=seeds)
def test_a_document_longer_than_a_row_is_cut_into_whole_rows_and_a_rest(lengths, row_tokens, seed):
    rows = best_fit(lengths, row_tokens=row_tokens, seed=seed)
    for document, length in enumerate(lengths):
        pieces = sorted(piece for row in rows for piece in row if piece.document == document)
        assert [piece.start for piece in pieces] == list(range(0, length, row_tokens))
        assert all(piece.length == row_tokens for piece in pieces[:-1])


@given(lengths=lengths_that_fit, row_tokens=st.integers(64, 256), seed=seeds)
def test_best_fit_fills_rows_as_the_naive_algorithm_does(lengths, row_tokens, seed):
    rows = best_fit(lengths, row_tokens=row_tokens, seed=seed)
    assert sorted(fills_of(rows)) == sorted(naive_best_fit(lengths, row_tokens))


@given(lengths=lengths_that_fit, seed=seeds)
def test_no_two_rows_of_best_fit_would_fit_into_one(lengths, seed):
    emptiest = sorted(fills_of(best_fit(lengths, row_tokens=100, seed=seed)))[:2]
    assert len(emptiest) < 2 or sum(emptiest) > 100


def test_rows_of_best_fit_come_shuffled():
    lengths = list(range(1, 201))
    n_pieces = [len(row) for row in best_fit(lengths, row_tokens=200, seed=0)]
    # Unshuffled, all rows of one long document come first.
    assert n_pieces != sorted(n_pieces)


@given(lengths=lengths_of_any_kind, row_tokens=st.integers(16, 256), seed=seeds)
def test_concatenate_fills_every_row_but_the_last(lengths, row_tokens, seed):
    fills = fills_of(concatenate(lengths, row_tokens=row_tokens, seed=seed))
    assert all(fill == row_tokens for fill in fills[:-1])
    assert len(fills) == -(-sum(lengths) // row_tokens)


@given(lengths=lengths_of_any_kind, row_tokens=st.integers(16, 256), seed=seeds)
def test_concatenate_lays_each_document_out_in_one_stretch(lengths, row_tokens, seed):
    rows = concatenate(lengths, row_tokens=row_tokens, seed=seed)
    next_token = {}
    order = []
    for piece in (piece for row in rows for piece in row):
        assert piece.start == next_token.get(piece.document, 0)
        next_token[piece.document] = piece.start + piece.length
        order.append(piece.document)
    changes = [document for at, document in enumerate(order) if order[at - 1 : at] != [document]]
    assert len(changes) == len(set(order))


@given(length=st.integers(0, 40), window=st.none() | st.integers(1, 50))
def test_attention_pairs_equals_a_brute_force_count(length, window):
    visible = [
        (query, key)
        for query in range(length)
        for key in range(length)
        if key <= query and (window is None or query - key < window)
    ]
    assert attention_pairs(length, window) == len(visible)


@pytest.mark.parametrize("window", [None, 4096])
def test_attention_pairs_of_the_longest_row_do_not_overflow(window):
    seen = np.arange(1, 131_073, dtype=object)
    expected = sum(seen if window is None else np.minimum(seen, window))
    assert attention_pairs(131_072, window) == expected


@given(lengths=lengths_that_fit)
def test_segments_are_documents_or_the_whole_row(lengths):
    row = [Piece(document, 0, length) for document, length in enumerate(lengths)]
    assert attention_segments(row, crosses_documents=False) == lengths
    assert attention_segments(row, crosses_documents=True) == [sum(lengths)]
