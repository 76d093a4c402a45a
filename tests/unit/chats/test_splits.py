from __future__ import annotations

import pytest
from hypothesis import assume, given, strategies as st

from workflow_scripts.chats.conversations import parse
from workflow_scripts.chats.splits import choose_split, conversation_id
from workflow_scripts.settings import ReadingSettings

U, A = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def read(*messages, tools=None):
    record = {"messages": list(messages), "tools": tools}
    return parse(record, ReadingSettings(), str.strip)


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def test_tools_and_weights_are_part_of_the_id():
    variants = [read(U, A), read(U, A, tools=[TOOL]), read(U, {**A, "weight": 1}), read(U, A, A)]
    assert len({conversation_id(each.messages, each.tools) for each in variants}) == 4


def test_the_order_of_keys_does_not_change_the_id():
    messages = [U, {**A, "weight": 1}]
    turned = [dict(reversed(message.items())) for message in messages]
    one, other = (conversation_id(read(*each).messages) for each in (messages, turned))
    assert one == other


@given(key=keys, validation=st.floats(0, 0.5), test=st.floats(0, 0.5))
def test_a_split_without_a_share_gets_nothing(key, validation, test):
    def split(validation, test):
        return choose_split(key, validation_fraction=validation, test_fraction=test)

    assert split(validation, 0.0) != "test"
    assert split(0.0, test) != "validation"
    assert split(0.0, 0.0) == "train"
    assert split(0.0, 1.0) == "test"
    assert split(1.0, 0.0) == "validation"


@given(key=keys, validation=st.floats(0, 0.5), test=st.floats(0, 0.5), more=st.floats(0, 0.5))
def test_a_larger_test_share_removes_nothing_from_the_test_split(key, validation, test, more):
    assume(test + more <= 0.5)
    if choose_split(key, validation_fraction=validation, test_fraction=test) == "test":
        assert (
            choose_split(key, validation_fraction=validation, test_fraction=test + more) == "test"
        )


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.05), (0.2, 0.1), (0.0, 0.3)])
def test_splits_have_the_requested_sizes(validation, test):
    n_keys = 20_000
    splits = [
        choose_split(f"question {number}", validation_fraction=validation, test_fraction=test)
        for number in range(n_keys)
    ]
    expected = {"validation": validation, "test": test, "train": 1 - validation - test}
    for split, fraction in expected.items():
        # Four standard deviations of a binomial share; the keys are fixed.
        margin = 4 * (fraction * (1 - fraction) / n_keys) ** 0.5
        assert abs(splits.count(split) / n_keys - fraction) <= margin


def test_a_lone_surrogate_can_be_a_split_key():
    assert choose_split("\ud800", validation_fraction=0, test_fraction=1) == "test"
