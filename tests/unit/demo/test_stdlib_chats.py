from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import pytest

from tests import signature_answers
from tests.signature_answers import asked_signature
from workflow_scripts import files
from workflow_scripts.chats import clean_dataset, conversations
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.demo import build_demo_dataset
from workflow_scripts.demo.stdlib_chats import (
    CHATS_PER_SHELF,
    SYSTEM_PROMPTS,
    count_tokens,
    make_chats,
    subjects,
)
from workflow_scripts.demo.stdlib_docs import entries
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import ReadingSettings, config_files
from workflow_scripts.tokens.rendering import Renderer

WINDOW = 512  # tokens, demo's model


@pytest.fixture(scope="module")
def chats():
    return make_chats(n_conversations=200, seed=0)


@pytest.fixture(scope="module")
def by_name():
    return {one.entry.name: one for one in subjects(entries())}


class Split(NamedTuple):
    """A split of the demo's dataset, with the number of tokens of each chat."""

    messages: list[list[dict[str, Any]]]
    """Sorted by id."""
    n_tokens: list[int]
    n_supervised: list[int]
    n_prompt_tokens: list[int]
    """Tokens before the first answer."""


@pytest.fixture(scope="module")
def config():
    return config_files.read(config_files.DEMO)


@pytest.fixture(scope="module")
def demo(config, tokenizer_v3, tmp_path_factory) -> tuple[dict[str, Split], dict[str, Any]]:
    """The demo's dataset, made by the config, and its cleaning report."""
    folder = tmp_path_factory.mktemp("demo-chats")
    dataset = config["datasets"]["stdlib-help"]
    source = folder / "conversations.jsonl"
    build_demo_dataset.main(
        ["--settings", json.dumps(dataset["generate"]), "--conversations", str(source)]
    )
    clean_dataset.main(
        ["--source", "all", str(source), "--clean", str(folder / "clean")]
        + ["--settings", json.dumps({"cleaning": dataset["cleaning"]})]
    )
    renderer = Renderer(load_mistral_tokenizer(tokenizer_v3, for_training=True))
    splits = {}
    for name in SPLITS:
        rows = files.read_parquet(folder / "clean" / f"{name}.parquet").to_pylist()
        rows.sort(key=lambda row: row["id"])
        said = [
            [{"role": one["role"], "content": one["content"]} for one in row["messages"]]
            for row in rows
        ]
        rendered = [renderer.render(messages) for messages in said]
        splits[name] = Split(
            said,
            [len(one.input_ids) for one in rendered],
            [sum(end - start for start, end in one.supervised_spans) for one in rendered],
            [one.supervised_spans[0][0] for one in rendered],
        )
    return splits, files.read_json(folder / "clean" / "cleaning_report.json")


def turns_of(messages):
    said = [message for message in messages if message["role"] != "system"]
    assert [message["role"] for message in said] == ["user", "assistant"] * (len(said) // 2)
    return [(said[at]["content"], said[at + 1]["content"]) for at in range(0, len(said), 2)]


def first_turn(chat):
    return turns_of(chat["messages"])[0]


@pytest.mark.parametrize("n_conversations", [1, 2, 33, 200])
def test_the_requested_number_of_chats_is_made(n_conversations):
    assert len(make_chats(n_conversations=n_conversations, seed=0)) == n_conversations


def test_chats_are_made_until_the_objects_run_out(by_name):
    chats = make_chats(n_conversations=10_000, seed=0)
    assert 250 <= len(chats) <= 500
    n_asked = sum(
        any(name in chat["messages"][-2]["content"] for chat in chats) for name in by_name
    )
    assert n_asked >= 0.2 * len(by_name)


def test_cleaning_keeps_every_chat_as_it_is(chats):
    for chat in chats:
        conversation = conversations.parse(chat, ReadingSettings(), str.strip)
        assert (conversation.messages, conversation.corrections) == (chat["messages"], [])
        assert conversation.fields["group"] == chat["group"]


def test_a_chat_has_its_last_answer_as_reference_if_it_is_a_fact(chats, by_name):
    purposes = {one.entry.docstring for one in by_name.values()}
    n_marked = 0
    for chat in chats:
        _, answer = turns_of(chat["messages"])[-1]
        is_purpose = any(
            answer.removesuffix(".") in " ".join(text.split()) for text in purposes
        ) and not answer.startswith(("The ", "It takes `", "It raises ", "None of its"))
        assert chat.get("reference") == (None if is_purpose else answer)
        n_marked += "reference" in chat
        conversation = conversations.parse(chat, ReadingSettings(), str.strip)
        assert conversation.references == (None if is_purpose else [answer])
    assert 150 <= n_marked < 200


def test_a_seed_decides_the_chats(chats):
    assert make_chats(n_conversations=200, seed=0) == chats
    assert make_chats(n_conversations=200, seed=1) != chats


def test_a_shelf_has_one_long_chat_of_many_turns_and_four_short_ones(chats):
    shelves = defaultdict(list)
    for chat in chats:
        shelves[chat["group"]].append(len(turns_of(chat["messages"])))
    assert set(shelves) == {f"shelf {number}" for number in range(40)}
    for lengths in shelves.values():
        assert len(lengths) == CHATS_PER_SHELF
        *short, long = sorted(lengths)
        assert min(short) == 3 and max(short) in (4, 5)
        assert long >= 8
    n_system = sum(chat["messages"][0]["role"] == "system" for chat in chats)
    assert 34 <= n_system <= 86  # three in ten of 200, four standard deviations either way
    assert {chat["messages"][0]["content"] for chat in chats} >= set(SYSTEM_PROMPTS)


def test_nine_in_ten_first_questions_ask_for_a_signature(chats):
    others = [chat for chat in chats if not asked_signature(first_turn(chat)[0])]
    assert len(others) == 20
    assert max(Counter(chat["group"] for chat in others).values()) == 1


def test_signatures_are_right_and_follow_from_the_pasted_text(chats, by_name):
    n_asked = 0
    for chat in chats:
        said = ""
        for question, answer in turns_of(chat["messages"]):
            said += question
            if (name := asked_signature(question)) is None:
                continue
            n_asked += 1
            assert signature_answers.is_right(answer, name)
            assert f"`{name}`" in question
            assert by_name[name].text in said or f"{by_name[name].entry.call}\n" in said
    assert n_asked > 220


def test_no_object_and_no_class_is_in_two_groups(chats, by_name):
    groups = defaultdict(set)
    n_chats = Counter()
    for chat in chats:
        questions = [question for question, _ in turns_of(chat["messages"])]
        asked = set(re.findall(r"`([\w.]+)`", "\n".join(questions))) & set(by_name)
        # A listing shows other objects too: `name(…)` and an indented sentence.
        lines = "\n".join(questions).splitlines()
        listed = {line.partition("(")[0] for line in lines} & set(by_name)
        for name in asked | listed:
            groups[by_name[name].owner].add(chat["group"])
            n_chats[name] += 1
    assert len(groups) > 100 and len(n_chats) > 350
    assert {owner: names for owner, names in groups.items() if len(names) > 1} == {}
    assert max(n_chats.values()) == 1


def test_tokens_are_counted_within_a_sixth(chats, tokenizer_v3):
    """On the long chats, 0.87 to 1.01 tokens per counted token were measured."""
    official = load_mistral_tokenizer(tokenizer_v3, for_training=True).instruct_tokenizer.tokenizer
    n_checked = 0
    for chat in chats:
        text = "\n".join(message["content"] for message in chat["messages"])
        n_tokens = len(official.encode(text, bos=False, eos=False))
        if n_tokens > WINDOW:
            assert count_tokens(text) == pytest.approx(n_tokens, rel=1 / 6)
            n_checked += 1
    assert n_checked >= 40


def test_no_memory_address_is_left(chats):
    assert not [chat for chat in chats if " at 0x" in json.dumps(chat)]


def test_cleaning_rejects_none_of_the_demos_chats(demo):
    _, report = demo
    assert report["n_read"] == 115
    assert report["rejected_by_reason"] == {}


def test_the_demos_splits_have_the_expected_sizes(demo):
    """With every interpreter the groups are in the same splits; sizes differ only in the texts."""
    splits, _ = demo
    assert {name: len(split.messages) for name, split in splits.items()} == {
        "train": 70,
        "validation": 10,
        "test": 35,
    }
    assert 22_000 <= sum(splits["train"].n_tokens) <= 28_000
    assert sum(splits["test"].n_tokens) <= 16_000
    assert 2_200 <= sum(splits["test"].n_supervised) <= 3_000


def test_a_fifth_of_the_demos_chats_is_longer_than_the_window_and_fits_a_row(demo, config):
    row_tokens = config["packings"]["swa-aware-demo"]["row_tokens"]
    for split in demo[0].values():
        n_long = sum(length > WINDOW for length in split.n_tokens)
        assert n_long >= 0.2 * len(split.n_tokens)
        assert max(split.n_tokens) <= row_tokens


def test_every_first_question_of_the_demo_fits_the_window_with_an_answer(demo):
    for split in demo[0].values():
        assert max(split.n_prompt_tokens) <= WINDOW - 200


def test_most_of_the_first_20_test_questions_ask_for_a_signature(demo):
    asked = [turns_of(messages)[0] for messages in demo[0]["test"].messages[:20]]
    assert sum(asked_signature(question) is not None for question, _ in asked) >= 14
