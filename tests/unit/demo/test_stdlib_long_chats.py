from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
import pytest

from tests.signature_answers import asked_signature
from workflow_scripts.chats import conversations
from workflow_scripts.demo import recall
from workflow_scripts.demo.stdlib_docs import entries
from workflow_scripts.demo.stdlib_long_chats import N_SHELVES, make_long_chats, pasted
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import ReadingSettings
from workflow_scripts.tokens.rendering import Renderer

STATEMENT = re.compile(r"The code of (\w+) is (\d{4})\.")


@pytest.fixture(scope="module")
def chats():
    return make_long_chats(n_conversations=300, seed=0)


def turns_of(chat):
    said = [message for message in chat["messages"] if message["role"] != "system"]
    assert [message["role"] for message in said] == ["user", "assistant"] * (len(said) // 2)
    return [(said[at]["content"], said[at + 1]["content"]) for at in range(0, len(said), 2)]


def on_one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("n_conversations", [1, 2, 33, 300])
def test_the_requested_number_of_chats_is_made(n_conversations):
    assert len(make_long_chats(n_conversations=n_conversations, seed=0)) == n_conversations


def test_cleaning_keeps_every_chat_as_it_is(chats):
    for chat in chats:
        conversation = conversations.parse(chat, ReadingSettings(), str.strip)
        assert (conversation.messages, conversation.corrections) == (chat["messages"], [])
        assert conversation.fields["group"] == chat["group"]


def test_a_code_is_the_reference_if_it_is_asked_for_last(chats):
    codes = [chat for chat in chats if "What is the code of" in turns_of(chat)[-1][0]]
    assert len(codes) > 10
    for chat in codes:
        assert chat["reference"] == turns_of(chat)[-1][1] and len(chat["reference"]) == 4


def test_a_seed_decides_the_chats():
    first, again, other = (make_long_chats(n_conversations=50, seed=seed) for seed in (0, 0, 1))
    assert again == first != other


def test_lengths_span_several_windows_and_fit_in_a_row(chats, tokenizer_v3):
    """The demo has a window of 512 tokens and rows of 4,096."""
    renderer = Renderer(load_mistral_tokenizer(tokenizer_v3, for_training=True))
    lengths = np.array([len(renderer.render(chat["messages"]).input_ids) for chat in chats])
    assert 200 <= lengths.min() <= 400 and 3_200 <= lengths.max() <= 4_096
    # With a log-uniform length, 300 to 600 tokens are as frequent as 1,500 to 3,000; but the last
    # turn exceeds it. Measured 0.51 to 0.83 over seeds; a uniform length would give 0.2.
    n_short = ((lengths >= 300) & (lengths < 600)).sum()
    n_long = ((lengths >= 1_500) & (lengths < 3_000)).sum()
    assert 0.35 <= n_short / n_long <= 1.2
    assert (lengths > 4 * 512).mean() >= 0.15


def test_every_answer_follows_from_what_was_said_before(chats):
    by_name = {entry.name: entry for entry in entries()}
    n_checked = defaultdict(int)
    for chat in chats:
        said = ""
        for question, answer in turns_of(chat):
            said += "\n" + question
            asked = question.rpartition("\n")[2]
            if "`" not in asked:
                n_checked["code"] += 1
                city = re.fullmatch(r"What is the code of (\w+)\?", asked).group(1)
                assert dict(STATEMENT.findall(said))[city] == answer
                continue
            entry = by_name[asked.split("`")[1]]
            # Not its signature: that of logging.shutdown names the current handlers.
            assert entry.docstring in said
            if asked_signature(question) == entry.name:
                n_checked["signature"] += 1
                call = re.fullmatch(r"The signature is `(.*)`\.", answer).group(1)
                assert call.startswith(f"{entry.name.rpartition('.')[2]}(")
                assert f"{call}\n\n{entry.docstring}" in said
            elif answer == "None of its parameters has a default.":
                n_checked["defaults"] += 1
                parameters = entry.signature.parameters.values()
                assert all(one.default is one.empty for one in parameters)
            elif answer.startswith(("It takes `", "The defaults are `")):
                n_checked[answer.split()[0]] += 1
                assert all(name in said for name in re.findall(r"`\**(\w+)", answer))
            else:
                n_checked["purpose"] += 1
                assert answer.removesuffix(".") in on_one_line(said)
            said += "\n" + answer
    assert len(n_checked) == 6 and min(n_checked.values()) >= 100


def test_a_fact_is_stated_once_and_asked_at_most_once(chats):
    n_stated = n_asked = 0
    for chat in chats:
        stated, asked = [], []
        for question, _ in turns_of(chat):
            stated += [city for city, _ in STATEMENT.findall(question)]
            asked += re.findall(r"What is the code of (\w+)\?", question)
        assert len(set(stated)) == len(stated) and len(set(asked)) == len(asked)
        assert set(asked) <= set(stated)
        n_stated += len(stated)
        n_asked += len(asked)
    assert n_asked >= 300 and n_stated - n_asked >= 50  # some facts are distractors


def test_facts_are_a_few_to_thousands_of_words_back(chats):
    distances = []
    for chat in chats:
        said = ""
        for question, answer in turns_of(chat):
            said += question
            found = re.search(r"What is the code of (\w+)\?$", question)
            if found:
                statement = recall.Fact(found.group(1), answer).statement
                distances.append(len(said) - said.index(statement) - len(statement))
            said += answer
    assert min(distances) < 100
    # About 3.2 characters per token: beyond one window, and beyond four.
    assert np.mean(np.array(distances) > 512 * 3.2) >= 0.15
    assert max(distances) > 4 * 512 * 3.2


def test_a_help_text_is_in_one_group(chats):
    texts = {pasted(entry) for entry in entries() if len(pasted(entry)) > 60}
    groups = defaultdict(set)
    for chat in chats:
        said = "\n\n".join(question for question, _ in turns_of(chat))
        for text in texts:
            if f"\n\n{text}\n\n" in f"\n\n{said}\n\n":
                groups[text].add(chat["group"])
    assert len(groups) > 1_500
    assert {text for text, names in groups.items() if len(names) > 1} == set()
    assert len({chat["group"] for chat in chats}) == N_SHELVES
