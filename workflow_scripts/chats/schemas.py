"""Shapes of chat records, each converted to OpenAI's `messages` without further checks.

    messages           {"messages": [{"role": "user", "content": …}, …], "tools": [ … ]}
    sharegpt           {"conversations": [{"from": "human", "value": …}, …], "system": …}
    prompt_completion  {"prompt": …, "completion": …}, texts or lists of messages
    alpaca             {"instruction": …, "input": …, "output": …}
    text               {"text": …}

A record that fits several shapes is read as the first of them in this order. A record of any shape
may have a `reference`: the right answer to its last question, or a list of right answers. Answers
are compared with it; it is not trained on.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts.chats.rejections import Rejected

if TYPE_CHECKING:
    from workflow_scripts.settings import ReadingSettings

# A JSON object whose shape is not known yet.
Json = dict[str, Any]  # untyped: a user's file
# The role of a plain text; a message of a chat may not have it.
TEXT = "text"
# The fields that a record of each format must have.
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# Other names of a field, unless `columns` gives one.
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
# Accepted in every shape, because data is often only half converted.
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
# The fields of a message that `columns` may rename.
MESSAGE_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "weight")


class RawChat(NamedTuple):
    """A record in OpenAI's shape; its values and messages are not checked yet."""

    shape: str
    messages: list[Any]
    """A plain text is one message with the role `text`."""
    tools: Any
    reference: Any
    fields: Json
    """The whole record, with its other fields."""


def raw_chat(content: Any, reading: ReadingSettings) -> RawChat:
    """Return a record's messages and tools in OpenAI's shape.

    Raises:
        Rejected: the record does not have the requested shape, or any known one.
    """
    if isinstance(content, list):  # bare messages
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
    """Return the name of a value's JSON type, for the detail of a rejection."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, int | float) else "value")


def parsed(value: Any) -> Any:
    """Return the list or object that a text spells, because a cell of a table can only hold text.

    The text may be JSON, or Python as pandas writes it into a CSV file. All else is returned
    unchanged.
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
    """A record or a message whose fields are looked up by our names for them."""

    def __init__(self, content: Json, columns: Mapping[str, str]) -> None:
        self.content = content
        self.columns = columns

    def name(self, field: str) -> str:
        """Return the name of the field in this record."""
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
        """Return the field's value; None if it is absent or null."""
        return self.content.get(self.name(field))

    def messages(self, field: str) -> list[Any]:
        """Return the messages of a field, with OpenAI's names for their fields."""
        messages = parsed(self[field])
        if not isinstance(messages, list):
            raise Rejected("messages are not a list", f"{self.name(field)}: {json_type(messages)}")
        return [
            _message(message, self.columns) if isinstance(message, dict) else message
            for message in messages
        ]

    def system(self) -> Iterator[Json]:
        """Yield the system message, if a field next to the messages holds one."""
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
    """Return tool calls as ShareGPT writes them, in the text of the message."""
    calls = parsed(content)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Rejected("a tool call is not an object", f"function_call: {json_type(calls)}")
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
    """True if a completion begins with the prompt, as `chosen` of preference data often does."""
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
        # A text remains a text, even if it spells a list.
        if isinstance(record[field], list):
            yield from record.messages(field)
        else:
            yield {"role": role, "content": record[field]}


def _from_alpaca(record: _Fields) -> Iterator[Any]:
    yield from record.system()
    history = parsed(record["history"]) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Rejected("history is not a list of pairs", json_type(pair))
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}
    question = record["instruction"]
    if not _is_blank(record["input"]):
        question = [question, record["input"]]  # parts, to be joined by a blank line
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
