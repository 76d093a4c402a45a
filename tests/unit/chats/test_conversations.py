from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion

from workflow_scripts.chats import (
    conversations,
    message_text,
    records as chat_records,
    schemas,
    tool_calls as calls_of_tools,
)
from workflow_scripts.chats.conversations import parse
from workflow_scripts.chats.rejections import Rejected
from workflow_scripts.chats.splits import conversation_id
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import ReadingSettings

AUTO = ReadingSettings()


def strip(text: str) -> str:
    return text.strip()


def message(role: object, content: object, **fields: object) -> dict:
    return {"role": role, "content": content, **fields}


def call(name: object = "look", arguments: object = "{}", **fields: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def calls(*listed: object, content: object = None) -> dict:
    return message("assistant", content, tool_calls=list(listed))


def result(content: object = "4", **fields: object) -> dict:
    return message("tool", content, **fields)


def chat(*messages: object, **fields: object) -> dict:
    return {"messages": list(messages), **fields}


def tool(name: object = "look", parameters: object = None, **fields: object) -> dict:
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters or {}},
        **fields,
    }


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


U, A, S = message("user", "What?"), message("assistant", "That."), message("system", "Be brief.")
NINE = "abcdefgh1"

BAD = [
    # Shape
    (3, "unknown record shape", "number"),
    (None, "unknown record shape", "null"),
    ("hello", "unknown record shape", "text"),
    ({}, "unknown record shape", "fields: none"),
    ({"chat": [], "id": 3}, "unknown record shape", "fields: chat, id"),
    ({"messages": None}, "unknown record shape", "fields: messages"),
    ({"prompt": "a"}, "unknown record shape", "fields: prompt"),
    ({"messages": "hello"}, "messages are not a list", "messages: text"),
    ({"messages": "[broken"}, "messages are not a list", "messages: text"),
    ({"messages": {"role": "user"}}, "messages are not a list", "messages: object"),
    ({"conversation": 3}, "messages are not a list", "conversation: number"),
    (
        {"instruction": "a", "output": "b", "history": ["q"]},
        "history is not a list of pairs",
        "text",
    ),
    ({"instruction": "a", "output": "b", "history": 3}, "history is not a list of pairs", "number"),
    # Messages
    ([], "no messages", ""),
    (chat(), "no messages", ""),
    (chat("hello"), "a message is not an object", "message 1: text"),
    (chat(U, None), "a message is not an object", "message 2: null"),
    (chat(U, ["assistant", "x"]), "a message is not an object", "message 2: list"),
    (chat(message("narrator", "x"), A), "unknown role", "message 1: 'narrator'"),
    (chat(message("text", "x"), A), "unknown role", "message 1: 'text'"),
    (chat(message(None, "x"), A), "unknown role", "message 1: None"),
    (chat(message(["user"], "x"), A), "unknown role", "message 1: ['user']"),
    (chat({"content": "x"}, A), "unknown role", "message 1: None"),
    (chat(U, A, message("r" * 99, "x")), "unknown role", f"message 3: '{'r' * 79}"),
    (chat(U), "no answer", ""),
    (chat(S), "no answer", ""),
    (chat(U, result()), "no answer", ""),
    (chat(U, message("assistant", "")), "an empty message", "message 2"),
    (chat(U, message("assistant", None)), "an empty message", "message 2"),
    (chat(U, message("assistant", " \n\u3000 ")), "an empty message", "message 2"),
    (chat(message("user", ""), A), "an empty message", "message 1"),
    (chat({"role": "user"}, A), "an empty message", "message 1"),
    (chat(message("user", []), A), "an empty message", "message 1"),
    (chat(U, calls()), "an empty message", "message 2"),
    ({"text": " "}, "an empty message", ""),
    (chat(U, message("assistant", 4)), "content is not text", "message 2: number"),
    (chat(U, message("assistant", {"a": 1})), "content is not text", "message 2: object"),
    (
        chat(message("user", [{"type": "image_url", "image_url": {"url": "x"}}]), A),
        "content is not text",
        "message 1: part 'image_url'",
    ),
    (chat(message("user", [{"type": "text"}]), A), "content is not text", "message 1: part 'text'"),
    (chat(message("user", [3]), A), "content is not text", "message 1: part 'number'"),
    ({"text": 3}, "content is not text", "number"),
    ({"prompt": 3, "completion": "a"}, "content is not text", "message 1: number"),
    (
        chat(U, message("assistant", "\ud83d")),
        "half a character",
        "message 2: unexpected end of data",
    ),
    (
        chat(U, message("assistant", "\ude00x")),
        "half a character",
        "message 2: illegal encoding",
    ),
    # Order
    (chat(A), "an answer before any question", "message 1"),
    (chat(S, A, U, A), "an answer before any question", "message 2"),
    (chat(U, A, S, U, A), "wrong order of roles", "message 3: system after assistant"),
    (chat(U, result(), A), "a tool result without its call", "message 2"),
    (chat(result(), U, A), "a tool result without its call", "message 1"),
    (chat(U, A, result(), A), "a tool result without its call", "message 2: 0 calls, 1 results"),
    (
        chat(U, calls(call()), result(), result(), A),
        "a tool result without its call",
        "message 2: 1 calls, 2 results",
    ),
    (
        chat(U, calls(call()), U, A),
        "a tool call without its result",
        "message 2: 1 calls, 0 results",
    ),
    (
        chat(U, calls(call(), call()), result(), A),
        "a tool call without its result",
        "message 2: 2 calls, 1 results",
    ),
    (
        chat(U, calls(call(id="x")), result(tool_call_id="y"), A),
        "a tool result without its call",
        "'y'",
    ),
    (chat(U, calls(call("f")), result(name="g"), A), "a tool result without its call", "'g'"),
    # Tools
    (
        chat(U, message("assistant", "", tool_calls=3)),
        "tool calls are not a list",
        "message 2: number",
    ),
    (chat(U, calls("f")), "a tool call is not an object", "message 2: text"),
    (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "f"},
            ]
        },
        "a tool call is not an object",
        "function_call: text",
    ),
    (
        chat(U, calls({"type": "custom"})),
        "a tool call is not a function call",
        "message 2: 'custom'",
    ),
    (chat(U, calls({"function": "f"})), "a tool call is not a function call", "message 2: None"),
    (chat(U, calls(call("a b"))), "a function name that is refused", "message 2: 'a b'"),
    (chat(U, calls(call("a\n"))), "a function name that is refused", "message 2: 'a\\n'"),
    (chat(U, calls(call(None))), "a function name that is refused", "message 2: None"),
    (
        chat(U, calls(call()), result(name="é"), A),
        "a function name that is refused",
        "message 3: '\\xe9'",
    ),
    (chat(U, calls(call("f", "{"))), "tool arguments are not a JSON object", "message 2: '{'"),
    (chat(U, calls(call("f", "[1]"))), "tool arguments are not a JSON object", "message 2: '[1]'"),
    (chat(U, calls(call("f", [1]))), "tool arguments are not a JSON object", "message 2: [1]"),
    (
        chat(U, calls(call("f", '{"a": "\\ud83d"}'))),
        "half a character",
        "message 2: surrogates not allowed",
    ),
    (
        chat(U, calls(call("f", nested(200)))),
        "JSON that cannot be rendered",
        "message 2: more than 100 levels",
    ),
    (
        chat(U, calls(call()), result("9" * 5000), A),
        "JSON that cannot be rendered",
        "message 3: ValueError",
    ),
    (
        chat(U, calls(call()), result("[" * 99999), A),
        "JSON that cannot be rendered",
        "message 3: RecursionError",
    ),
    (chat(U, A, tools="calculator"), "tools are not a list of objects", "text"),
    (chat(U, A, tools=["calculator"]), "tools are not a list of objects", "list"),
    (chat(U, A, tools=[tool("a b")]), "a function name that is refused", "'a b'"),
    (
        chat(U, A, tools=[tool(), {"type": "function"}]),
        "a tool that mistral-common refuses",
        "tool 2: function: Field required",
    ),
    (
        chat(U, A, tools=[tool(parameters={"type": "objekt"})]),
        "a tool that mistral-common refuses",
        "tool 1: 'objekt' is not valid under any of the given schemas",
    ),
    # Weights
    (chat(U, {**A, "weight": 0.5}), "a weight is neither 0 nor 1", "message 2: 0.5"),
    (chat(U, {**A, "weight": "1"}), "a weight is neither 0 nor 1", "message 2: '1'"),
    (chat(U, {**A, "weight": 0}), "every weight is 0", ""),
    (chat(U, {**A, "weight": 0}, A), "answers in a row of different weight", ""),
]


@pytest.mark.parametrize(("content", "reason", "detail"), BAD)
def test_a_bad_record_is_rejected_with_its_reason(content, reason, detail):
    with pytest.raises(Rejected) as caught:
        parse(content, AUTO, strip)
    assert (caught.value.reason, caught.value.detail) == (reason, detail)
    caught.value.detail.encode()


CORRECTED = [
    (chat(U, A, U), [U, A], "messages after the last answer dropped"),
    (chat(U, A, message("user", None), U), [U, A], "messages after the last answer dropped"),
    (chat(message("system", " "), U, A), [U, A], "empty system message dropped"),
    (chat(U, U, A), [message("user", "What?\n\nWhat?"), A], "messages in a row joined"),
    (
        chat(U, A, {**A, "weight": 1}),
        [U, message("assistant", "That.\n\nThat.", weight=1)],
        "messages in a row joined",
    ),
    (
        chat(U, A, calls(call(id=NINE))),
        [U, calls(call(id=NINE), content="That.")],
        "messages in a row joined",
    ),
    (
        chat(message("user", "\ud83d\ude00"), A),
        [message("user", "😀"), A],
        "halves of characters joined",
    ),
    (chat(U, {**A, "reasoning_content": "Hm."}), [U, A], "reasoning left out"),
    (
        chat(U, calls(call(arguments={"é": 2**70}, id=NINE))),
        [U, calls(call(arguments=f'{{"é": {2**70}}}', id=NINE))],
        "tool arguments written as JSON",
    ),
    (
        chat(U, calls(call(id=NINE)), result({"a": [1.5, None]}, tool_call_id=NINE), A),
        [U, calls(call(id=NINE)), result('{"a": [1.5, null]}', tool_call_id=NINE), A],
        "tool result written as JSON",
    ),
    (
        chat(U, calls(call(id=NINE)), result(), A),
        [U, calls(call(id=NINE)), result(tool_call_id=NINE), A],
        "tool call ids filled in",
    ),
    (
        chat(U, calls(call()), result(tool_call_id=NINE), A),
        [U, calls(call(id=NINE)), result(tool_call_id=NINE), A],
        "tool call ids filled in",
    ),
]


def without_empty(messages: list[dict]) -> list[dict]:
    return [{key: value for key, value in m.items() if value is not None} for m in messages]


@pytest.mark.parametrize(("content", "messages", "correction"), CORRECTED)
def test_a_correctable_record_is_corrected_and_the_correction_named(content, messages, correction):
    before = copy.deepcopy(content)
    conversation = parse(content, AUTO, strip)
    assert conversation.messages == without_empty(messages)
    assert conversation.corrections == [correction]
    assert content == before  # the record is left as it was read


def test_a_plain_chat_changes_only_by_the_repair_of_its_texts():
    inside = 'two  spaces\n\n\ttab "quotes" 🎉 \x00 ▁'
    record = chat(message("developer", " Be brief. "), message("user", f"\n{inside}\t"), A, group=7)
    conversation = parse(record, AUTO, strip)
    assert conversation.messages == [S, message("user", inside), A]
    assert conversation.fields is record
    assert (conversation.tools, conversation.corrections) == (None, [])


def test_fields_that_are_never_rendered_are_dropped():
    read = parse(chat({**U, "name": "x", "weight": 9}, {**A, "logprobs": [], "id": 3}), AUTO, strip)
    assert read.messages == [U, A]


def test_text_parts_are_joined_as_in_mistral_common():
    parts = [{"type": "text", "text": part} for part in ("a", "", "b")]
    assert parse(chat(message("user", parts), A), AUTO, strip).messages[0]["content"] == "a\n\nb"


def test_the_results_of_tools_are_not_repaired():
    record = chat(S, U, calls(call(id=NINE)), result(" a ", tool_call_id=NINE), A)
    mended = []
    parse(record, AUTO, lambda text: mended.append(text) or text)
    assert mended == [S["content"], U["content"], "", A["content"]]


def test_openais_former_functions_become_tools():
    record = chat(
        U,
        message("assistant", None, function_call={"name": "look", "arguments": '{"a": 1}'}),
        message("function", "4", name="look"),
        A,
        functions=[{"name": "look", "parameters": {"type": "object"}}],
    )
    read = parse(record, AUTO, strip)
    (called,) = read.messages[1]["tool_calls"]
    assert called["function"] == {"name": "look", "arguments": '{"a": 1}'}
    assert read.messages[2] == result(tool_call_id=called["id"], name="look")
    assert json.loads(read.tools) == [tool(parameters={"type": "object"})]
    assert read.corrections == ["function_call made tool_calls", "tool call ids filled in"]


def test_results_in_any_order_get_the_new_ids_of_their_calls():
    record = chat(
        U,
        calls(call("f", id="call_1"), call("g", id="call_2")),
        result("of g", tool_call_id="call_2"),
        result("of f", tool_call_id="call_1"),
        A,
        U,
        calls(call("f", id="call_1")),
        result("again", tool_call_id="call_1"),
        A,
    )
    read = parse(record, AUTO, strip)
    first, second = read.messages[1]["tool_calls"]
    (third,) = read.messages[6]["tool_calls"]
    assert [read.messages[at]["tool_call_id"] for at in (2, 3, 7)] == [
        *(second["id"], first["id"], third["id"])
    ]
    assert len({first["id"], second["id"], third["id"]}) == 3
    assert all(len(called["id"]) == 9 and called["id"].isalnum() for called in (first, second))
    assert parse(record, AUTO, strip) == read  # deterministic
    assert read.corrections == ["tool call ids replaced"]


def test_calls_with_the_same_id_are_distinguished_by_order():
    both = [call("f", id=NINE), call("g", id=NINE)]
    results = [result("of f", tool_call_id=NINE), result("of g", tool_call_id=NINE)]
    read = parse(chat(U, calls(*both), *results, A), AUTO, strip)
    ids = [called["id"] for called in read.messages[1]["tool_calls"]]
    assert len(set(ids)) == 2
    assert [m["tool_call_id"] for m in read.messages[2:4]] == ids


# Properties

characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x00\n \u00a0😀")
texts = st.text(characters, max_size=12)
ids = st.sampled_from([None, "", "null", NINE, "call_1", "call_2", 7])
json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(texts, json_texts, max_size=3)
names = st.sampled_from(["look", "get_weather", "a-b"])
tool_calls = st.builds(call, names, arguments | arguments.map(json.dumps), id=ids)
weights = st.sampled_from([None, 0, 1, True, 1.0])
answers = st.builds(message, st.just("assistant"), texts, weight=weights)
results = st.builds(result, texts | json_texts | json_texts.map(json.dumps), tool_call_id=ids)


@st.composite
def uses_of_tools(draw):
    """Return an answer with calls, and results that mostly match them."""
    made = draw(st.lists(tool_calls, min_size=1, max_size=3))
    found = [{**draw(results), "tool_call_id": called["id"]} for called in made]
    found = draw(st.permutations(found)) + draw(st.lists(results, max_size=1))
    content = draw(st.none() | st.none() | texts)
    return [message("assistant", content, tool_calls=made), *found[: draw(st.integers(0, 4))]]


plain_messages = st.one_of(
    st.builds(message, st.sampled_from(["user", "system", "developer"]), texts), answers
).map(lambda one: [one])
turns = st.tuples(st.builds(message, st.just("user"), texts), answers).map(list)
anything = st.one_of(turns, turns, uses_of_tools(), plain_messages)
parameters = st.sampled_from(
    [{}, None, {"type": "object", "properties": {"a": {"type": "string"}}}]
)
tool_lists = st.none() | st.lists(st.builds(tool, names, parameters), max_size=2)
records = st.builds(
    lambda parts, tools: chat(U, *(one for part in parts for one in part), A, tools=tools),
    st.lists(anything, max_size=4),
    tool_lists,
)


# Many of the generated records are rejected, as they should be.
ACCEPTED_ALONE = settings(suppress_health_check=[HealthCheck.filter_too_much])


def accepted(record):
    try:
        return parse(record, AUTO, strip)
    except Rejected:
        assume(False)


def request_of(conversation, *, finetuning=False):
    tools = json.loads(conversation.tools) if conversation.tools else None
    request = ChatCompletionRequest.from_openai(conversation.messages, tools)
    if finetuning:
        for at, read in enumerate(request.messages):
            if read.role == "assistant":
                weight = conversation.messages[at].get("weight")
                fields = {**read.model_dump(), "weight": weight}
                request.messages[at] = FinetuningAssistantMessage.model_validate(fields)
    return request


def has_text_beside_calls(conversation):
    return any("content" in m and "tool_calls" in m for m in conversation.messages)


@given(record=records)
@settings(ACCEPTED_ALONE, max_examples=300)
def test_accepted_conversations_pass_mistral_commons_validation_of_every_version(record):
    conversation = accepted(record)
    for version in TokenizerVersion:
        if version < TokenizerVersion.v7 and has_text_beside_calls(conversation):
            continue
        validator = get_validator(version, ValidationMode.finetuning)
        request = validator.validate_request(request_of(conversation, finetuning=True))
        if version < TokenizerVersion.v15:  # it also needs settings of a model
            normalized = get_normalizer(version).from_chat_completion_request(request)
            answers = [m for m in normalized.messages if m.role == "assistant"]
            n_answers = sum(m["role"] == "assistant" for m in conversation.messages)
            assert len(answers) == n_answers  # nothing was left to join


@pytest.fixture(scope="module", params=["v3", "v7"])
def official(request, exported_tokenizer):
    return load_mistral_tokenizer(exported_tokenizer(request.param), for_training=True)


@given(record=records)
@settings(ACCEPTED_ALONE, max_examples=150)
def test_accepted_conversations_are_rendered(official, record):
    conversation = accepted(record)
    is_v3 = official.instruct_tokenizer.tokenizer.version == TokenizerVersion.v3
    assume(not (is_v3 and has_text_beside_calls(conversation)))
    tokens = official.encode_chat_completion(request_of(conversation)).tokens
    n_answers = sum(m["role"] == "assistant" for m in conversation.messages)
    assert tokens.count(official.instruct_tokenizer.tokenizer.eos_id) == n_answers


stripped = texts.map(str.strip).filter(bool)
rows_of_one_role = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), stripped), max_size=6
).map(lambda pairs: [U, *(message(*pair) for pair in pairs), A])


@given(messages=rows_of_one_role)
@settings(max_examples=100)
def test_joining_gives_the_same_tokens_as_joining_in_mistral_common(official, messages):
    read = parse(chat(*messages), AUTO, strip)
    roles = [m["role"] for m in read.messages]
    assert all(one != other for one, other in zip(roles, roles[1:], strict=False))
    given_messages = ChatCompletionRequest.from_openai(messages)
    assert (
        official.encode_chat_completion(request_of(read)).tokens
        == official.encode_chat_completion(given_messages).tokens
    )


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
fields = ("role", "content", "from", "value", "tool_calls", "tool_call_id", "weight", "name")
roles = st.sampled_from(["user", "assistant", "system", "tool", "function", "function_call"])
messages_like = st.dictionaries(st.sampled_from(fields), any_json | roles, max_size=5)
record_fields = ("messages", "conversations", "prompt", "completion", "instruction", "output")
records_like = st.dictionaries(
    st.sampled_from((*record_fields, "input", "history", "text", "tools", "system")),
    any_json | st.lists(messages_like | any_json, max_size=3),
    max_size=4,
)


@given(content=any_json | records_like)
@settings(max_examples=300)
def test_any_value_is_either_kept_or_rejected(content):
    try:
        conversation = parse(content, AUTO, strip)
    except Rejected as rejection:
        assert rejection.reason and rejection.reason in str(rejection)
        rejection.detail.encode()
        return
    json.dumps(conversation.messages, ensure_ascii=False).encode()
    assert conversation.messages[-1]["role"] in ("assistant", "text")


@given(record=records)
@ACCEPTED_ALONE
def test_a_corrected_conversation_needs_no_further_correction(record):
    once = accepted(record)
    again = parse(chat(*once.messages, tools=once.tools and json.loads(once.tools)), AUTO, strip)
    assert (again.messages, again.tools, again.corrections) == (once.messages, once.tools, [])


@given(one=records, other=records)
@ACCEPTED_ALONE
def test_ids_are_equal_if_and_only_if_contents_are(one, other):
    one, other = accepted(one), accepted(other)
    identities = [conversation_id(each.messages, each.tools) for each in (one, other)]
    is_equal = (one.messages, one.tools) == (other.messages, other.tools)
    assert (identities[0] == identities[1]) == is_equal


# What data/README.md says


README = Path(schemas.__file__).parents[2] / "data" / "README.md"


def literals(node_matches) -> set[str]:
    """Return the texts that `node_matches` finds in the syntax trees of the modules that read."""
    modules = (chat_records, schemas, message_text, calls_of_tools, conversations)
    trees = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in modules]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {text for node in nodes for text in node_matches(node)}


def reasons_in(node):
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Rejected":
        yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def corrections_in(node):
    if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) == "corrections":
        yield node.slice.value


@pytest.mark.parametrize(
    ("title", "node_matches"),
    [("What is rejected", reasons_in), ("What is corrected", corrections_in)],
)
def test_the_readme_lists_exactly_the_reasons_and_corrections_of_reading(title, node_matches):
    readme = README.read_text(encoding="utf-8")
    section = readme.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if "| " in line
    ]
    assert rows[2:] == list(dict.fromkeys(rows[2:]))
    assert set(rows[2:]) == literals(node_matches)


def test_every_reason_and_correction_is_covered_by_these_tests():
    in_tables = {reason for _, reason, _ in BAD}
    of_others = {
        *("not UTF-8", "not JSON", "a row does not fit the header"),  # test_chunks
        "missing field",  # test_schemas
    }
    assert in_tables | of_others == literals(reasons_in)
    tested = {correction for *_, correction in CORRECTED}
    of_others = {"function_call made tool_calls", "tool call ids replaced"}
    assert tested | of_others == literals(corrections_in)


def test_the_examples_in_the_readme_have_the_format_that_they_illustrate():
    readme = README.read_text(encoding="utf-8")
    examples = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`[;,:]", readme, re.MULTILINE)
    assert [shape for shape, _ in examples] == list(schemas.REQUIRED)
    for shape, record in examples:
        assert schemas.raw_chat(json.loads(record), AUTO).shape == shape
        assert parse(json.loads(record), AUTO, strip).corrections == []
