"""Messages in OpenAI's shape, as `clean_dataset` writes them.

They are plain dicts, because there are millions, and Arrow and mistral-common take dicts.
"""

from __future__ import annotations

import re
from typing import NotRequired, TypedDict

# The form that mistral-common requires of the id of a tool call.
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
SPLITS = ("train", "validation", "test")


class Function(TypedDict):
    """The function that a tool call names."""

    name: str
    arguments: str
    """A JSON object as text."""


class ToolCall(TypedDict):
    """One tool call of an answer."""

    id: str | None
    """None until `tool_calls.match_results` has filled it in."""
    type: str
    """`function`."""
    function: Function


class Message(TypedDict):
    """One message. A key may be absent if its value is null."""

    role: str
    """`system`, `user`, `assistant`, `tool`; or `text`, for a plain text."""
    content: NotRequired[str | None]
    """None in an answer that only calls tools."""
    tool_calls: NotRequired[list[ToolCall] | None]
    """Tool calls of an answer."""
    tool_call_id: NotRequired[str | None]
    """The call that a tool's result belongs to."""
    name: NotRequired[str | None]
    """The function that a tool's result comes from."""
    weight: NotRequired[int | None]
    """0 if the answer is not trained on."""
