from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.facts import MISTRAL_7B
from workflow_scripts.scoring.pieces import comparable_tokens, cut, longest, stretches
from workflow_scripts.tokens.documents import Document


@st.composite
def rendered(draw):
    """A document whose tokens are their own positions, so that a piece shows where it was cut."""
    is_supervised = draw(st.lists(st.booleans(), min_size=1, max_size=120))
    return Document("chat", np.arange(len(is_supervised), dtype=np.int32), np.array(is_supervised))


piece_lengths = st.integers(4, 60)


def sources(piece):
    """Positions in the document of a piece's scored tokens."""
    return piece.input_ids[piece.scored].tolist()


@given(n_tokens=st.integers(1, 300), piece_tokens=piece_lengths)
def test_every_piece_except_the_first_carries_half_a_piece_of_context(n_tokens, piece_tokens):
    first, *others = stretches(n_tokens, piece_tokens)
    assert first == (0, min(n_tokens, piece_tokens), 0)
    end = first[1]
    for start, next_end, n_context in others:
        assert n_context == min(piece_tokens, n_tokens) // 2
        assert start + n_context == end < next_end <= start + piece_tokens
        end = next_end
    assert end == n_tokens


@given(documents=st.lists(rendered(), max_size=4), piece_tokens=st.none() | piece_lengths)
def test_every_supervised_token_except_a_documents_first_is_scored_once(documents, piece_tokens):
    pieces = list(cut(documents, piece_tokens=piece_tokens))
    found = Counter((piece.document, at) for piece in pieces for at in sources(piece))
    expected = {
        (number, at)
        for number, document in enumerate(documents)
        for at in np.flatnonzero(document.is_supervised).tolist()
        if at > 0
    }
    assert found == Counter(expected)
    assert [piece.document for piece in pieces] == sorted(piece.document for piece in pieces)


@given(document=rendered(), piece_tokens=piece_lengths)
def test_pieces_keep_the_limit_and_start_with_the_documents_first_token(document, piece_tokens):
    for piece in cut([document], piece_tokens=piece_tokens):
        assert len(piece.input_ids) <= piece_tokens
        assert piece.input_ids[0] == 0
        assert len(piece.scored) > 0 and piece.scored.min() > 0


@given(document=rendered(), piece_tokens=piece_lengths)
def test_a_piece_is_a_run_of_the_document_after_its_first_token(document, piece_tokens):
    first, *later = list(cut([document], piece_tokens=piece_tokens)) or [None]
    if first is not None and first.input_ids[1] == 1:
        assert first.input_ids.tolist() == list(range(len(first.input_ids)))
    for piece in later:
        run = piece.input_ids[1:]
        assert run.tolist() == list(range(run[0], run[0] + len(run)))


@given(document=rendered(), piece_tokens=piece_lengths)
def test_a_token_of_a_later_piece_has_half_a_piece_of_context(document, piece_tokens):
    for piece in cut([document], piece_tokens=piece_tokens):
        for position, source in zip(piece.scored.tolist(), sources(piece), strict=True):
            # All tokens before it, or at least half a piece (BOS in front counts as one).
            assert position == source or position >= piece_tokens // 2


@given(document=rendered(), extra=st.integers(0, 5))
def test_a_document_no_longer_than_a_piece_stays_whole(document, extra):
    piece_tokens = max(4, len(document.input_ids) + extra)
    pieces = list(cut([document], piece_tokens=piece_tokens))
    if document.is_supervised[1:].any():
        assert [piece.input_ids.tolist() for piece in pieces] == [document.input_ids.tolist()]
    else:
        assert pieces == []


@pytest.mark.parametrize(
    ("window", "context", "wanted", "expected"),
    [
        (4096, 32768, None, 4096),
        (None, 32768, None, 32768),
        (4096, 32768, 512, 512),
        (4096, 32768, 9999, 4096),
        (None, 1024, 2048, 1024),
    ],
)
def test_pieces_end_at_the_window_or_else_the_context(window, context, wanted, expected):
    facts = MISTRAL_7B.changed(sliding_window=window, context_tokens=context)
    assert comparable_tokens(facts, wanted) == expected


@given(documents=st.lists(rendered(), max_size=4), piece_tokens=st.none() | piece_lengths)
def test_longest_is_the_length_of_the_longest_piece(documents, piece_tokens):
    pieces = list(cut(documents, piece_tokens=piece_tokens))
    assert longest(pieces) == max([1, *(len(piece.input_ids) for piece in pieces)])
