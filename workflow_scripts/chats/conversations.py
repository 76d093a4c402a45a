"""Conversations: records, corrected if that is safe, otherwise rejected with a reason.

mistral-common renders every conversation that passes, with any version of the tokenizer. There are
two exceptions, which `render_chats` rejects: tools before v3, and text next to tool calls in one
answer before v7. The rules are those of mistral-common's validator and normalizer in fine-tuning
mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workflow_scripts.chats import schemas, tool_calls
from workflow_scripts.chats.message_text import (
    BETWEEN_JOINED,
    Corrections,
    Repair,
    read_text,
    shown,
)
from workflow_scripts.chats.messages import Message
from workflow_scripts.chats.rejections import Rejected

if TYPE_CHECKING:
    from workflow_scripts.settings import ReadingSettings


@dataclass(frozen=True)
class Conversation:
    """A chat that mistral-common renders, or a plain text."""

    messages: list[Message]
    """Without null fields."""
    tools: str | None
    """OpenAI's list of tools, as JSON."""
    references: list[str] | None
    """Right answers to the last question; None if the record has none."""
    fields: schemas.Json
    """The record as read."""
    corrections: list[str]
    """Phrases that name the corrections, each once."""


def parse(content: Any, reading: ReadingSettings, repair: Repair) -> Conversation:
    """Return a record as a conversation, corrected if that is safe.

    Args:
        content: the record; it is not changed.
        repair: repairs a text; it is not applied to the results of tools.
    Raises:
        Rejected: the record cannot be used.
    """
    chat = schemas.raw_chat(content, reading)
    corrections: Corrections = {}
    if chat.shape == schemas.TEXT:
        plain = _read_message(schemas.TEXT, chat.messages[0], repair, corrections)
        assert plain is not None  # only a system message may be dropped
        return Conversation([plain], None, None, chat.fields, [*corrections])
    messages = _read_messages(chat.messages, repair, corrections)
    _check_order(messages)
    if any("tool_calls" in message or message["role"] == "tool" for message in messages):
        tool_calls.match_results(messages, corrections)
    messages = _join(messages, corrections)
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise Rejected("every weight is 0")
    tools = tool_calls.read_tools(chat.tools)
    references = _references(chat.reference, repair, corrections)
    return Conversation(messages, tools, references, chat.fields, [*corrections])


def _read_messages(raw: Sequence[Any], repair: Repair, corrections: Corrections) -> list[Message]:
    """Return the messages up to the last answer, each read by itself."""
    messages: list[Message] = []
    roles = [_role(message, number) for number, message in enumerate(raw, start=1)]
    if not roles:
        raise Rejected("no messages")
    if "assistant" not in roles:
        raise Rejected("no answer")
    while roles[-1] != "assistant":
        roles.pop()
        corrections["messages after the last answer dropped"] = None
    for number, (role, message) in enumerate(zip(roles, raw, strict=False), start=1):
        try:
            read = _read_message(role, message, repair, corrections)
        except Rejected as rejection:
            detail = f": {rejection.detail}" if rejection.detail else ""
            raise Rejected(rejection.reason, f"message {number}{detail}") from rejection
        if read is not None:
            messages.append(read)
    return messages


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict):
        detail = f"message {number}: {schemas.json_type(message)}"
        raise Rejected("a message is not an object", detail)
    role = message.get("role")
    known = schemas.ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise Rejected("unknown role", f"message {number}: {shown(role)}")
    return known


def _read_message(
    role: str, message: schemas.Json, repair: Repair, corrections: Corrections
) -> Message | None:
    """Return a message; None for an empty system message."""
    if role == "tool":
        return tool_calls.read_result(message, corrections)
    read: Message = {"role": role}
    text = read_text(message.get("content"), repair, corrections)
    if text:
        read["content"] = text
    # A plain answer has no fields except `role` and `content`.
    if role == "assistant" and (len(message) > 2 or not text):
        _read_answer_fields(read, message, corrections)
    if "content" in read or "tool_calls" in read:
        return read
    if role != "system":
        raise Rejected("an empty message")
    corrections["empty system message dropped"] = None
    return None


def _read_answer_fields(read: Message, message: schemas.Json, corrections: Corrections) -> None:
    """Add an answer's tool calls and weight."""
    if calls := tool_calls.read_calls(message, corrections):
        read["tool_calls"] = calls
    weight = message.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise Rejected("a weight is neither 0 nor 1", shown(weight))
        read["weight"] = int(weight)
    if any(message.get(field) for field in ("reasoning_content", "reasoning", "thinking")):
        corrections["reasoning left out"] = None


def _references(marked: Any, repair: Repair, corrections: Corrections) -> list[str] | None:
    """Return the right answers of a record as texts, without those that are neither text nor
    number."""
    answers = schemas.parsed(marked)
    texts = [
        read_text(answer if isinstance(answer, str) else str(answer), repair, corrections)
        for answer in (answers if isinstance(answers, list) else [marked])
        if isinstance(answer, str | int | float) and not isinstance(answer, bool)
    ]
    return [text for text in texts if text] or None


def _check_order(messages: Sequence[Message]) -> None:
    previous = "system"
    has_user = False
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        is_answered = previous in ("assistant", "tool")
        if role == "assistant" and not has_user:
            raise Rejected("an answer before any question", f"message {number}")
        if role == "tool" and not is_answered:
            raise Rejected("a tool result without its call", f"message {number}")
        if role == "system" and is_answered:
            raise Rejected("wrong order of roles", f"message {number}: {role} after {previous}")
        has_user |= role == "user"
        previous = role


def _join(messages: list[Message], corrections: Corrections) -> list[Message]:
    """Join neighbours of one role, as mistral-common would do later.

    Joining them here makes an answer one message for every reader. System messages are not joined,
    because from v7 on each remains separate.
    """
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        role = message["role"]
        if last is None or last["role"] != role or role not in ("user", "assistant"):
            joined.append(message)
            continue
        if (last.get("weight") == 0) != (message.get("weight") == 0):
            raise Rejected("answers in a row of different weight")
        # The keys have the order of a message that is read whole, because the id depends on it.
        both: Message = {"role": role}
        texts = [text for part in (last, message) if (text := part.get("content"))]
        if texts:
            both["content"] = BETWEEN_JOINED.join(texts)
        if calls := message.get("tool_calls") or last.get("tool_calls"):
            both["tool_calls"] = calls
        weight = message.get("weight", last.get("weight"))
        if weight is not None:
            both["weight"] = weight
        joined[-1] = both
        corrections["messages in a row joined"] = None
    return joined
