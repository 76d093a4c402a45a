from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter

import pytest

from workflow_scripts.data import conversations
from workflow_scripts.data.stdlib_chats import SYSTEM_PROMPTS, chats_about, make_chats
from workflow_scripts.models.stdlib_docs import Entry, entries
from workflow_scripts.settings import ReadingSettings


@pytest.fixture(scope="module")
def chats():
    return make_chats(n_conversations=1000, seed=0)


def first_turn(chat):
    turns = [message for message in chat["messages"] if message["role"] != "system"]
    return turns[0]["content"], turns[1]["content"]


@pytest.mark.parametrize("n_conversations", [1, 2, 33, 500])
def test_there_are_as_many_chats_as_asked(n_conversations):
    assert len(make_chats(n_conversations=n_conversations, seed=0)) == n_conversations


def test_cleaning_keeps_every_chat_as_it_is(chats):
    for chat in chats:
        conversation = conversations.parse(chat, ReadingSettings(), str.strip)
        assert (conversation.messages, conversation.corrections) == (chat["messages"], [])
        assert conversation.fields["group"] == chat["group"]


def test_a_reference_is_the_last_answer_where_a_fact_is_asked_for(chats):
    marked = [chat for chat in chats if "reference" in chat]
    assert len(marked) > 300
    for chat in chats:
        question, answer = (message["content"] for message in chat["messages"][-2:])
        asks_for_fact = "signature" in question.split("`")[0] or "Which parameters" in question
        assert chat.get("reference") == (answer if asks_for_fact else None)
        conversation = conversations.parse(chat, ReadingSettings(), str.strip)
        assert conversation.references == ([answer] if asks_for_fact else None)


def test_no_chat_stands_twice(chats):
    assert max(Counter(map(first_turn, chats)).values()) == 1


def test_a_seed_decides_the_chats(chats):
    assert make_chats(n_conversations=1000, seed=0) == chats
    assert make_chats(n_conversations=1000, seed=1) != chats


def test_there_are_long_chats_turns_and_system_prompts(chats):
    n_system = sum(chat["messages"][0]["role"] == "system" for chat in chats)
    assert 150 <= n_system <= 250  # a fifth of 1,000, four standard deviations either way
    systems = {chat["messages"][0]["content"] for chat in chats} & set(SYSTEM_PROMPTS)
    assert systems == set(SYSTEM_PROMPTS)
    assert max(len(chat["messages"]) for chat in chats) >= 6
    lengths = sorted(sum(len(m["content"]) for m in chat["messages"]) for chat in chats)
    assert lengths[0] < 150 and 4_000 < lengths[-1] < 10_000
    overviews = [chat for chat in chats if "Give an overview" in first_turn(chat)[0]]
    assert len(overviews) == 30


def test_answers_are_what_the_library_says(chats):
    by_name = {entry.name: entry for entry in entries()}
    n_checked = Counter()
    for chat in chats:
        question, answer = first_turn(chat)
        entry = by_name.get(chat["group"])
        if question.startswith("What does"):
            assert answer == entry.summary.rstrip(" .:") + "."
        elif question.startswith("What is the signature"):
            assert answer == f"Its signature is `{entry.call}`."
        elif question.startswith("Show the documentation"):
            assert answer == entry.docstring
        elif question.startswith("Which parameters"):
            named = [p for p in entry.signature.parameters if p not in ("self", "cls")]
            places = [answer.find(f"`{name}`") for name in named]
            assert -1 not in places and places == sorted(places)
            assert bool(named) == (answer != "It takes no parameters.")
        else:
            assert question == f"Give an overview of the module `{chat['group']}`."
        n_checked[question.partition("`")[0]] += 1
    assert len(n_checked) == 5 and min(n_checked.values()) >= 30


def test_no_memory_address_is_left(chats):
    assert not [chat for chat in chats if " at 0x" in json.dumps(chat)]


def numbered_entry(number):
    module = f"module{number % 3}"
    kind = ("function", "class", "method")[number % 5 % 3]
    name = f"{module}.Kind{number}.call" if kind == "method" else f"{module}.name{number}"
    of_kind = inspect.Parameter
    parameters = [
        of_kind("self", of_kind.POSITIONAL_OR_KEYWORD),
        of_kind("path", of_kind.POSITIONAL_OR_KEYWORD),
        of_kind("size", of_kind.KEYWORD_ONLY, default=number),
        of_kind("options", of_kind.VAR_KEYWORD),
    ][: number % 5]
    signature = inspect.Signature(parameters) if number % 7 else None
    lines = f"Line {number} of it. " * (1 + 40 * (number % 11 == 0))
    return Entry(name, kind, signature, f"Says what number {number} does.\n\n{lines}".strip())


def test_chats_about_the_same_objects_are_those_of_every_version_so_far():
    # The library's docstrings differ between interpreters, so the objects are made here. The hash
    # was taken of commit af1f88b; overviews and whole docstrings are among the chats.
    chats = chats_about(list(map(numbered_entry, range(60))), n_conversations=90, seed=4)
    marked = [chat.pop("reference") for chat in chats if "reference" in chat]
    assert marked  # beside the conversations since then
    text = json.dumps(chats, ensure_ascii=False)
    expected = "3aaf62ca8e9a0cfb03c33b8eacf3448a39fdadf82d3d66d2383f72940a35b833"
    assert hashlib.sha256(text.encode()).hexdigest() == expected
