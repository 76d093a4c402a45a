"""What a chat is made of, in OpenAI's shape: the rows that `clean_dataset` writes.

These are plain dicts: a million conversations pass by, and Arrow and mistral-common take dicts.
"""

from __future__ import annotations

import re
from typing import NotRequired, TypedDict

# mistral-common's, for the ids of tool calls.
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
SPLITS = ("train", "validation", "test")


class Function(TypedDict):
    """What a tool call calls."""

    name: str
    arguments: str
    """A JSON object as text."""


class ToolCall(TypedDict):
    """One call of an answer."""

    id: str | None
    """None until `conversations` has filled it in."""
    type: str
    """`function`."""
    function: Function


class Message(TypedDict):
    """One message. A key may be missing where its value is null."""

    role: str
    """`system`, `user`, `assistant`, `tool`; or `text`, which is a plain text."""
    content: NotRequired[str | None]
    """None in an answer that only calls tools."""
    tool_calls: NotRequired[list[ToolCall] | None]
    """Calls of an answer."""
    tool_call_id: NotRequired[str | None]
    """The call that a tool's result belongs to."""
    name: NotRequired[str | None]
    """The function that a tool's result is from."""
    weight: NotRequired[int | None]
    """0 where an answer is not learned."""
