from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts.quantize import calibration
from workflow_scripts.tokens.documents import Documents

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@pytest.fixture
def documents(random_documents, tmp_path) -> Documents:
    return random_documents(tmp_path / "train.arrow", [5, 9, 30, 12, 7, 20, 16])


@given(length=st.integers(1, 100), chunk_tokens=st.integers(1, 40))
def test_a_cut_text_is_complete_except_for_the_first_tokens_of_its_parts(length, chunk_tokens):
    text = np.arange(1, length + 1, dtype=np.int32)
    parts = list(calibration.cut(text, chunk_tokens=chunk_tokens))
    assert [len(part) for part in parts[:-1]] == [chunk_tokens] * (len(parts) - 1)
    assert [part[0] for part in parts] == [1] * len(parts)
    expected = text.copy()
    expected[::chunk_tokens] = 1
    assert np.concatenate(parts).tolist() == expected.tolist()
    assert text.tolist() == list(range(1, length + 1))  # the text itself is unchanged


@given(lengths=lengths, n_tokens=st.integers(1, 200))
def test_exactly_the_requested_number_of_tokens_is_taken(lengths, n_tokens):
    sequences = [np.full(length, at) for at, length in enumerate(lengths)]
    taken = list(calibration.first_tokens(iter(sequences), n_tokens))
    assert sum(map(len, taken)) == min(n_tokens, sum(lengths))
    assert all(len(sequence) for sequence in taken)
    whole = np.concatenate(sequences)
    assert np.concatenate(taken).tolist() == whole[:n_tokens].tolist()


@given(lengths=lengths, batch_tokens=st.integers(40, 90), n_sequences=st.integers(1, 5))
def test_batches_keep_the_order_and_both_limits(lengths, batch_tokens, n_sequences):
    sequences = [np.full(length, at) for at, length in enumerate(lengths)]
    batches = list(
        calibration.batches(sequences, size=len, limit=batch_tokens, n_items=n_sequences)
    )
    assert [id(one) for batch in batches for one in batch] == [id(one) for one in sequences]
    assert all(0 < len(batch) <= n_sequences for batch in batches)
    assert all(sum(map(len, batch)) <= batch_tokens for batch in batches)
    # No batch had room for the first sequence of the next one.
    for batch, following in itertools.pairwise(batches):
        n_tokens = sum(map(len, batch)) + len(following[0])
        assert n_tokens > batch_tokens or len(batch) == n_sequences


def test_every_chat_is_drawn_once_if_there_are_tokens_for_all(documents):
    drawn = calibration.chats(documents, chunk_tokens=30, n_tokens=1000)
    found = sorted(tuple(sequence.tolist()) for sequence in drawn)
    assert found == sorted(tuple(document.input_ids.tolist()) for document in documents)


def test_the_same_chats_are_drawn_each_time_and_not_the_first_of_the_file(documents):
    first, second = (
        [one.tolist() for one in calibration.chats(documents, chunk_tokens=30, n_tokens=40)]
        for _ in range(2)
    )
    assert first == second
    assert first[0] != documents[0].input_ids.tolist()


def test_a_chat_that_training_sees_twice_is_drawn_twice(documents):
    documents.n_copies = np.array([1, 1, 2, 1, 1, 0, 1])
    drawn = [one.tolist() for one in calibration.chats(documents, chunk_tokens=30, n_tokens=1000)]
    assert len(drawn) == 7
    assert drawn.count(documents[2].input_ids.tolist()) == 2
    assert documents[5].input_ids.tolist() not in drawn
