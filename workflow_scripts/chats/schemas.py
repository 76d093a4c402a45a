"""Shapes of chat records, each turned into OpenAI's `messages`; nothing is judged yet.

    messages           {"messages": [{"role": "user", "content": …}, …], "tools": [ … ]}
    sharegpt           {"conversations": [{"from": "human", "value": …}, …], "system": …}
    prompt_completion  {"prompt": …, "completion": …}, texts or lists of messages
    alpaca             {"instruction": …, "input": …, "output": …}
    text               {"text": …}

A record that fits several is read as the first of them in this order. Any of them may have a
`reference`: the right answer to its last question, or a list of right ones, which is measured by
and not trained on.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts.chats.rejections import Rejected

if TYPE_CHECKING:
    from workflow_scripts.settings import ReadingSettings

# An object before it is recognized: any keys, and values of any type.
Json = dict[str, Any]  # untyped: a user's file
# The role of a plain text, which no message may claim.
TEXT = "text"
# By format, what makes a record one.
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# Other names a field goes by, where `columns` does not say.
ALIASES = {
    "conversations": ("conversation",),
    "prompt": ("question",),
    "completion": ("response", "answer", "chosen"),
    "input": ("context",),
    "output": ("response",),
    "system": ("system_prompt",),
    "tools": ("functions",),
    "role": ("from",),
    "content": ("value",),
}
# In any of the shapes: data is often half converted.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
# What `columns` may rename within a message.
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "weight")


class RawChat(NamedTuple):
    """A record in OpenAI's shape; the values are unchecked, the messages may be anything."""

    shape: str
    messages: list[Any]
    """A plain text is one message of the role `text`."""
    tools: Any
    reference: Any
    fields: Json
    """The whole record, for what else it holds."""


def raw_chat(content: Any, reading: ReadingSettings) -> RawChat:
    """A record's messages and tools, whatever shape they have there.

    Raises:
        Rejected: the record has not the shape that is asked for, or none that is known.
    """
    if isinstance(content, list):  # the messages, with nothing around them
        content = {reading.columns.get("messages", "messages"): content}
    if not isinstance(content, dict):
        raise Rejected("unknown record shape", json_type(content))
    record = _Fields(content, reading.columns)
    shape = _recognized(record) if reading.format == "auto" else reading.format
    missing = _missing_field(record, shape)
    if missing is not None:
        raise Rejected("missing field", record.name(missing))
    return RawChat(
        shape, list(READERS[shape](record)), record["tools"], record["reference"], content
    )


def json_type(value: Any) -> str:
    """What JSON calls it, for a rejection's detail."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, int | float) else "value")


def parsed(value: Any) -> Any:
    """The list or object that a text spells: a cell of a table holds no other values.

    As JSON, or as Python prints it, which is what pandas writes into a CSV file. Anything else
    stays as it is.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return value


class _Fields:
    """A record or a message, asked by our names for its fields."""

    def __init__(self, content: Json, columns: Mapping[str, str]) -> None:
        self.content = content
        self.columns = columns

    def name(self, field: str) -> str:
        """What the field is called here."""
        if self.columns:
            for name in (field, *ALIASES.get(field, ())):
                if name in self.columns:
                    return self.columns[name]
        if self.content.get(field) is None:
            for alias in ALIASES.get(field, ()):
                if self.content.get(alias) is not None:
                    return alias
        return field

    def __getitem__(self, field: str) -> Any:
        """Its value; None where it is absent or null."""
        return self.content.get(self.name(field))

    def messages(self, field: str) -> list[Any]:
        """The messages of a field, their own fields called as in OpenAI's."""
        messages = parsed(self[field])
        if not isinstance(messages, list):
            raise Rejected("messages are no list", f"{self.name(field)}: {json_type(messages)}")
        return [
            _message(message, self.columns) if isinstance(message, dict) else message
            for message in messages
        ]

    def system(self) -> Iterator[Json]:
        """The system message that stands beside the others."""
        if not _is_blank(self["system"]):
            yield {"role": "system", "content": self["system"]}


def _message(message: Json, columns: Mapping[str, str]) -> Json:
    if not columns and message.get("role") not in (None, "function_call"):
        return message
    fields = _Fields(message, columns)
    if columns:
        message = {**message, **{name: fields[name] for name in MESSAGE_FIELDS}}
    named = {**message, "role": fields["role"], "content": fields["content"]}
    if named["role"] == "function_call":
        named |= {"content": None, "tool_calls": _spelled_calls(named["content"])}
    return named


def _spelled_calls(content: Any) -> list[Json]:
    """Tool calls of ShareGPT, where they are the message's text."""
    calls = parsed(content)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Rejected("a tool call is no object", f"function_call: {json_type(calls)}")
    for call in calls:
        if isinstance(call.get("arguments"), dict):
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return calls


def _recognized(record: _Fields) -> str:
    for shape in REQUIRED:
        if _missing_field(record, shape) is None:
            return shape
    fields = ", ".join(map(str, record.content))
    raise Rejected("unknown record shape", f"fields: {fields or 'none'}"[:200])


def _missing_field(record: _Fields, shape: str) -> str | None:
    required = REQUIRED[shape]
    if shape == "prompt_completion" and _is_whole_chat(parsed(record["completion"])):
        required = ("completion",)
    return next((name for name in required if record[name] is None), None)


def _is_whole_chat(completion: Any) -> bool:
    """Preference data often repeats the prompt in `chosen`."""
    first = completion[0] if isinstance(completion, list) and completion else None
    return isinstance(first, dict) and first.get("role") in ("system", "user")


def _from_messages(record: _Fields) -> list[Any]:
    return record.messages("messages")


def _from_sharegpt(record: _Fields) -> Iterator[Any]:
    yield from record.system()
    yield from record.messages("conversations")


def _from_prompt_completion(record: _Fields) -> Iterator[Any]:
    yield from record.system()
    if _is_whole_chat(parsed(record["completion"])):
        yield from record.messages("completion")
        return
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        # A text stays one, even if it spells a list.
        if isinstance(record[field], list):
            yield from record.messages(field)
        else:
            yield {"role": role, "content": record[field]}


def _from_alpaca(record: _Fields) -> Iterator[Any]:
    yield from record.system()
    history = parsed(record["history"]) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected("history is no list of pairs", json_type(pair))
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}
    question = record["instruction"]
    if not _is_blank(record["input"]):
        question = [question, record["input"]]  # parts, which a blank line joins
    yield {"role": "user", "content": question}
    yield {"role": "assistant", "content": record["output"]}


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _from_text(record: _Fields) -> Iterator[Any]:
    yield {"role": TEXT, "content": record["text"]}


READERS: dict[str, Callable[[_Fields], Iterable[Any]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "text": _from_text,
}
