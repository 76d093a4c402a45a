from __future__ import annotations

import json

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from workflow_scripts.data import conversations
from workflow_scripts.data.conversations import Record, Rejected, choose_split, parse_messages
from workflow_scripts.log import StageError


def record(raw: str, *, is_utf8: bool = True) -> Record:
    return Record("chats.jsonl", 1, raw, is_utf8)


def chat(*messages: tuple[object, object], **others: object) -> Record:
    listed = [{"role": role, "content": content} for role, content in messages]
    return record(json.dumps({"messages": listed, **others}))


QUESTION, ANSWER = ("user", "What?"), ("assistant", "That.")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (record("caf\ufffd", is_utf8=False), "not UTF-8"),
        (record("{"), "not JSON"),
        (record("hello"), "not JSON"),
        (record("[" * 100_000), "not JSON"),
        (record("[]"), "no list `messages`"),
        (record("3"), "no list `messages`"),
        (record("{}"), "no list `messages`"),
        (record('{"messages": "hello"}'), "no list `messages`"),
        (record('{"messages": null}'), "no list `messages`"),
        (record('{"messages": ["hello"]}'), "a message is no object"),
        (record('{"messages": [null]}'), "a message is no object"),
        (chat(("tool", "x"), ANSWER), "unknown role 'tool'"),
        (chat((None, "x"), ANSWER), "unknown role 'None'"),
        (chat(("r" * 99, "x")), f"unknown role '{'r' * 40}'"),
        (record('{"messages": [{"content": "x"}]}'), "unknown role 'None'"),
        (chat(QUESTION, ("assistant", None)), "a message has no text"),
        (chat(QUESTION, ("assistant", 4)), "a message has no text"),
        (chat(QUESTION, ("assistant", [{"type": "text"}])), "a message has no text"),
        (record('{"messages": [{"role": "user"}]}'), "a message has no text"),
        (chat(QUESTION, ("assistant", "")), "an empty message"),
        (chat(QUESTION, ("assistant", " \n\t\u3000 ")), "an empty message"),
        (chat(("system", " "), QUESTION, ANSWER), "an empty message"),
        (chat(QUESTION, ("assistant", "\ud83d")), "a lone surrogate in the text"),
        (chat(), "no turn"),
        (chat(("system", "Be brief.")), "no turn"),
        (chat(ANSWER), "wrong role order: assistant where user is expected"),
        (chat(QUESTION, QUESTION), "wrong role order: user where assistant is expected"),
        (chat(QUESTION, ANSWER, ANSWER), "wrong role order: assistant where user is expected"),
        (
            chat(QUESTION, ANSWER, ("system", "x")),
            "wrong role order: system where user is expected",
        ),
        (chat(("system", "x"), ("system", "y")), "wrong role order: system where user is expected"),
        (chat(QUESTION), "the last message is not an answer"),
        (chat(QUESTION, ANSWER, QUESTION), "the last message is not an answer"),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason(line, reason):
    with pytest.raises(Rejected) as caught:
        parse_messages(line)
    assert str(caught.value) == reason


def test_a_good_line_keeps_its_text_but_for_the_ends():
    inside = 'two  spaces\n\n\ttab "quotes" 🎉 \x00 ▁'
    line = chat(("system", " Be brief. "), ("user", f"\n{inside}\t"), ANSWER, group="json")
    messages, group = parse_messages(line)
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": inside.strip()},
        {"role": "assistant", "content": "That."},
    ]
    assert group == "json"


@pytest.mark.parametrize(("given_group", "group"), [(None, None), ("a", "a"), (7, "7")])
def test_a_group_is_text_or_none(given_group, group):
    assert parse_messages(chat(QUESTION, ANSWER, group=given_group))[1] == group


def test_other_keys_are_no_matter():
    line = record(
        '{"messages": [{"role": "user", "content": "a", "name": "x"},'
        ' {"role": "assistant", "content": "b"}], "id": 3}'
    )
    assert [set(message) for message in parse_messages(line)[0]] == [{"role", "content"}] * 2


roles = st.sampled_from(["system", "user", "assistant"])


@given(roles=st.lists(roles, max_size=7))
def test_the_order_of_roles_is_that_of_a_grammar(roles):
    letters = "".join(role[0] for role in roles)
    is_chat = letters.removeprefix("s") == "ua" * (len(letters) // 2) and "ua" in letters
    try:
        conversations.check_order(roles)
    except Rejected:
        assert not is_chat
    else:
        assert is_chat


def json_values(texts):
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=12,
    )


any_json = json_values(st.text(max_size=12))
messages_like = st.fixed_dictionaries(
    {}, optional={"role": roles | any_json, "content": st.text() | any_json}
)
records_like = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(messages_like | any_json) | any_json, "group": any_json}
)


@given(raw=st.text() | any_json.map(json.dumps) | records_like.map(json.dumps))
@example(raw="")
@example(raw="NaN")
def test_any_text_is_kept_or_rejected_and_nothing_else(raw):
    try:
        messages, group = parse_messages(record(raw))
    except Rejected as reason:
        assert str(reason)
        return
    assert messages[-1]["role"] == "assistant"
    for message in messages:
        assert message["content"] == message["content"].strip() != ""
        message["content"].encode()
    assert group is None or isinstance(group, str)


@given(lines=st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)))
def test_every_line_that_is_not_blank_is_read_with_its_number(lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    records = list(conversations.read_records(path))
    assert [record.source_line for record in records] == [
        number for number, line in enumerate(lines, start=1) if line.strip()
    ]
    for record in records:
        line = lines[record.source_line - 1].rstrip(b"\r")
        assert record.source_file == str(path)
        try:
            expected = line.decode("utf-8")
        except UnicodeDecodeError:
            assert not record.is_utf8
        else:
            assert record.is_utf8 and record.raw == expected


def test_a_file_that_is_not_there_is_a_stage_error(tmp_path):
    with pytest.raises(StageError) as caught:
        list(conversations.read_records(tmp_path / "nowhere.jsonl"))
    for part in ("datasets.<name>.files", "nowhere.jsonl", "No such file", "to fix:"):
        assert part in str(caught.value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
messages = st.builds(lambda role, text: {"role": role, "content": text}, roles, texts)
chats = st.lists(messages, max_size=4)


@given(one=chats, other=chats)
def test_equal_content_has_equal_ids_and_only_that(one, other):
    ids = conversations.conversation_id(one), conversations.conversation_id(other)
    assert (ids[0] == ids[1]) == (one == other)


def test_the_order_of_keys_in_a_line_does_not_change_the_id():
    lines = [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]}',
    ]
    one, other = (conversations.conversation_id(parse_messages(record(line))[0]) for line in lines)
    assert one == other


@given(key=texts, validation=st.floats(0, 0.5), test=st.floats(0, 0.5))
def test_a_split_without_a_share_gets_nothing(key, validation, test):
    def split(validation, test):
        return choose_split(key, validation_fraction=validation, test_fraction=test)

    assert split(validation, 0.0) != "test"
    assert split(0.0, test) != "validation"
    assert split(0.0, 0.0) == "train"
    assert split(0.0, 1.0) == "test"
    assert split(1.0, 0.0) == "validation"


@given(key=texts, validation=st.floats(0, 0.5), test=st.floats(0, 0.5), more=st.floats(0, 0.5))
def test_a_larger_test_share_takes_nothing_out_of_it(key, validation, test, more):
    assume(test + more <= 0.5)
    if choose_split(key, validation_fraction=validation, test_fraction=test) == "test":
        assert (
            choose_split(key, validation_fraction=validation, test_fraction=test + more) == "test"
        )


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.05), (0.2, 0.1), (0.0, 0.3)])
def test_splits_are_as_large_as_asked(validation, test):
    n_keys = 20_000
    splits = [
        choose_split(f"question {number}", validation_fraction=validation, test_fraction=test)
        for number in range(n_keys)
    ]
    expected = {"validation": validation, "test": test, "train": 1 - validation - test}
    for split, fraction in expected.items():
        # Four standard deviations of a binomial share; the keys are fixed, so this never flickers.
        margin = 4 * (fraction * (1 - fraction) / n_keys) ** 0.5
        assert abs(splits.count(split) / n_keys - fraction) <= margin
