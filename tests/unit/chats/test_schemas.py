from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from workflow_scripts.chats import schemas
from workflow_scripts.chats.conversations import parse
from workflow_scripts.chats.rejections import Rejected
from workflow_scripts.settings import ReadingSettings

AUTO = ReadingSettings()

CHAT = [("user", "What?"), ("assistant", "That."), ("user", "Why?"), ("assistant", "So.")]
MESSAGES = [{"role": role, "content": text} for role, text in CHAT]
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION, ANSWER = MESSAGES[:2]


def from_value(*pairs: tuple[str, object]) -> list[dict]:
    return [{"from": role, "value": text} for role, text in pairs]


def messages_of(content: object, **reading: object) -> list[dict]:
    return parse(content, ReadingSettings(**reading), str).messages


SHAPES = [
    ("messages", {"messages": MESSAGES}),
    ("messages", MESSAGES),
    ("messages", {"messages": json.dumps(MESSAGES)}),
    ("messages", {"messages": repr(MESSAGES)}),  # as pandas writes a list into a cell
    ("messages", {"messages": from_value(*CHAT)}),
    ("messages", {"messages": [{"role": "human", "content": "What?"}, *MESSAGES[1:]]}),
    ("sharegpt", {"conversations": from_value(*CHAT)}),
    ("sharegpt", {"conversation": MESSAGES}),
    ("sharegpt", {"conversations": from_value(("human", "What?"), ("gpt", "That."), *CHAT[2:])}),
    ("sharegpt", {"conversations": from_value(CHAT[0], ("bing", "That."), *CHAT[2:])}),
    ("sharegpt", {"conversations": json.dumps(from_value(*CHAT)), "system": ""}),
    (
        "alpaca",
        {"instruction": "Why?", "input": "", "output": "So.", "history": [["What?", "That."]]},
    ),
    ("alpaca", {"instruction": "Why?", "output": "So.", "history": '[["What?", "That."]]'}),
    ("prompt_completion", {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}),
    ("prompt_completion", {"prompt": MESSAGES[:3], "completion": "So."}),
    ("prompt_completion", {"prompt": "What?", "completion": MESSAGES[1:]}),
    ("prompt_completion", {"prompt": "What?", "chosen": MESSAGES, "rejected": MESSAGES[:2]}),
    ("prompt_completion", {"chosen": MESSAGES, "rejected": MESSAGES[:2]}),
    ("prompt_completion", {"prompt": MESSAGES[:3], "chosen": MESSAGES[3:]}),
]


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize(("shape", "record"), SHAPES)
def test_one_chat_in_any_shape_gives_the_same_messages(shape, record, is_named):
    assert messages_of(record, format=shape if is_named else "auto") == MESSAGES
    assert schemas.raw_chat(record, AUTO).shape == shape


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What?", "completion": "That."},
        {"prompt": "What?", "response": "That."},
        {"question": "What?", "answer": "That.", "system": None},
        {"instruction": "What?", "output": "That."},
        {"instruction": "What?", "context": " ", "response": "That."},
    ],
)
def test_one_turn_in_any_shape_gives_the_same_messages(record):
    assert messages_of(record) == [QUESTION, ANSWER]
    assert messages_of({**record, "system": "Be brief."}) == [SYSTEM, QUESTION, ANSWER]


def test_an_input_follows_the_instruction_after_a_blank_line():
    record = {"instruction": "Sum.", "input": "1 2", "output": "3"}
    assert messages_of(record)[0]["content"] == "Sum.\n\n1 2"


def test_a_plain_text_is_one_message_of_its_own_role():
    assert messages_of({"text": "Once."}) == [{"role": "text", "content": "Once."}]


def test_sharegpts_calls_become_openais():
    tool = {"name": "look", "parameters": {"type": "object"}}
    called = {"name": "look", "arguments": {"at": "é"}}
    record = {
        "conversations": from_value(
            ("human", "What?"),
            ("function_call", json.dumps(called)),
            ("observation", '{"found": 4}'),
            ("gpt", "That."),
        ),
        "tools": json.dumps([tool]),
    }
    read = parse(record, AUTO, str)
    (made,) = read.messages[1]["tool_calls"]
    assert made["function"] == {"name": "look", "arguments": '{"at": "é"}'}
    assert read.messages[2] == {
        "role": "tool",
        "content": '{"found": 4}',
        "tool_call_id": made["id"],
    }
    assert json.loads(read.tools) == [{"type": "function", "function": tool}]
    in_openai_shape = {"messages": read.messages, "tools": json.loads(read.tools)}
    assert parse(in_openai_shape, AUTO, str).messages == read.messages


@pytest.mark.parametrize("shape", ["list", "JSON", "object"])
def test_tools_may_be_a_list_its_json_or_a_single_tool(shape):
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    given_tools = {"list": [tool], "JSON": json.dumps([tool]), "object": tool}[shape]
    read = parse({"messages": MESSAGES, "tools": given_tools}, AUTO, str)
    assert json.loads(read.tools) == [tool]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"dialog": MESSAGES}, {"messages": "dialog"}),
        (MESSAGES, {"messages": "dialog"}),
        (
            {"dialog": [{"who": m["role"], "said": m["content"]} for m in MESSAGES]},
            {"messages": "dialog", "role": "who", "content": "said"},
        ),
        (
            {"turns": [{"who": m["role"], "said": m["content"]} for m in MESSAGES]},
            {"conversations": "turns", "from": "who", "value": "said"},
        ),
    ],
)
def test_columns_rename_fields(record, columns):
    assert messages_of(record, columns=columns) == MESSAGES


def test_a_mapped_weight_becomes_the_weight_of_the_answer():
    messages = [QUESTION, {**ANSWER, "train": False}, QUESTION, {**ANSWER, "train": True}]
    read = messages_of({"messages": messages}, columns={"weight": "train"})
    assert [message.get("weight") for message in read] == [None, 0, None, 1]


def test_a_mapped_field_has_no_other_names():
    record = {"prompt": "What?", "completion": "That.", "gold": None}
    with pytest.raises(Rejected) as caught:
        messages_of(record, format="prompt_completion", columns={"completion": "gold"})
    assert (caught.value.reason, caught.value.detail) == ("missing field", "gold")


@pytest.mark.parametrize(
    ("shape", "record", "field"),
    [
        ("messages", {"conversations": []}, "messages"),
        ("messages", {"messages": None}, "messages"),
        ("sharegpt", {"messages": MESSAGES}, "conversations"),
        ("alpaca", {"instruction": "a"}, "output"),
        ("alpaca", {"output": "a"}, "instruction"),
        ("prompt_completion", {"answer": "a"}, "prompt"),
        ("prompt_completion", {"question": "a"}, "completion"),
        ("text", {"messages": MESSAGES}, "text"),
    ],
)
def test_a_named_shape_that_does_not_fit_names_the_missing_field(shape, record, field):
    with pytest.raises(Rejected) as caught:
        messages_of(record, format=shape)
    assert (caught.value.reason, caught.value.detail) == ("missing field", field)


BY_SHAPE = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": MESSAGES},
    "prompt_completion": {"prompt": "What?", "completion": "That."},
    "alpaca": {"instruction": "What?", "output": "That."},
    "text": {"text": "Once."},
}


@given(present=st.sets(st.sampled_from(list(BY_SHAPE)), min_size=1), seed=st.randoms())
def test_a_record_of_several_shapes_is_read_as_the_first_in_any_order_of_fields(present, seed):
    fields = [item for shape in present for item in BY_SHAPE[shape].items()]
    seed.shuffle(fields)
    first = next(shape for shape in BY_SHAPE if shape in present)
    assert schemas.raw_chat(dict(fields), AUTO).shape == first


@given(text=st.text() | st.sampled_from(["[", "[1]", "{}", "[INST] hi", '[{"role": "user"}]']))
def test_a_prompt_that_spells_a_list_remains_a_text(text):
    raw = schemas.raw_chat({"prompt": text, "completion": "x"}, AUTO)
    assert raw.messages[0] == {"role": "user", "content": text}


listed = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
).filter(lambda value: isinstance(value, list | dict))


@given(value=listed)
def test_a_value_spelled_in_a_cell_is_read_back(value):
    assert schemas.parsed(json.dumps(value)) == value
    assert schemas.parsed(f" {json.dumps(value, ensure_ascii=False)}\n") == value
    assert schemas.parsed(repr(value)) == value
