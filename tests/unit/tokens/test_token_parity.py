from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts.log import StageError
from workflow_scripts.tokens.token_parity import choose_sample, compare, learnable_answers

documents = st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=200)


def sample_of(rows, limit):
    lengths = np.array([length for length, _ in rows], dtype=np.int32)
    uses_tools = np.array([tools for _, tools in rows], dtype=bool)
    return choose_sample(lengths, uses_tools, limit).tolist()


@given(rows=documents, limit=st.integers(1, 250))
def test_a_sample_has_the_requested_size_and_the_longest_document(rows, limit):
    sample = sample_of(rows, limit)
    assert sample == sorted(set(sample))
    assert len(sample) == min(limit, len(rows))
    assert all(0 <= index < len(rows) for index in sample)
    if rows:
        assert max(rows[index][0] for index in sample) == max(length for length, _ in rows)


@given(rows=documents, limit=st.integers(10, 250))
def test_a_third_of_a_sample_uses_tools_if_the_file_has_enough(rows, limit):
    n_with_tools = sum(tools for _, tools in rows)
    in_sample = sum(rows[index][1] for index in sample_of(rows, limit))
    assert in_sample >= min(n_with_tools, limit // 3)


@given(rows=documents)
def test_without_a_limit_every_document_is_chosen(rows):
    assert sample_of(rows, None) == list(range(len(rows)))


@given(limit=st.integers(10, 100))
def test_a_sample_is_spread_over_the_file(limit):
    sample = sample_of([(7, False)] * 1000, limit)
    rest = sample[-(-limit // 10) :]  # all lengths are equal, so the first count as the longest
    gaps = np.diff(rest)
    assert rest[-1] > 1000 - 2 * max(gaps) and max(gaps) <= 2 * min(gaps) + 2


def spell(token_ids):
    return " ".join(f"<{token}>" for token in token_ids)


def compared(found, expected):
    compare(found, expected, what="differ", where="here", decode=spell, to_fix="mend")


@pytest.mark.parametrize(
    ("found", "expected", "at"),
    [([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([], [4], 0)],
)
def test_compare_names_the_first_token_that_differs(found, expected, at):
    with pytest.raises(StageError) as caught:
        compared(found, expected)
    assert f"where:    here, token {at}, after {spell(found[:at])!r}\n" in str(caught.value)


def test_compare_shows_both_sides_as_text():
    with pytest.raises(StageError) as caught:
        compared([1, 2, 3], [1, 9])
    assert "found:    2='<2>' 3='<3>'\n" in str(caught.value)
    assert "expected: 9='<9>'\n" in str(caught.value)
    with pytest.raises(StageError, match="expected: the end"):
        compared([1, 2], [1])


def test_compare_accepts_equal_tokens():
    assert compared([1, 2, 3], [1, 2, 3]) is None


def test_learnable_answers_of_each_version():
    call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": "e", "weight": 1},
    ]
    earlier, masked, last = (True, False), (False, False), (True, True)
    assert learnable_answers(messages, version="v3") == [earlier, masked, last]
    assert learnable_answers(messages, version="v2") == [masked, last]
    assert learnable_answers([{"role": "text", "content": "x"}], version="v3") == [(True, True)]
