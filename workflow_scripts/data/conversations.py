"""Conversations: reading them from JSON Lines, judging them, and choosing their split.

A conversation is kept whole or rejected with a reason; nothing is lost in silence. Every kept one
carries the file and line it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts.log import StageError

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = ("system", "user", "assistant")


def clean_schema() -> pa.Schema:
    """A kept conversation; `messages` and `tools` in OpenAI's shape.

    A message of a plain text has the role `text`. `weight` is null, 0 or 1, and an answer's alone.
    """
    import pyarrow as pa

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    message = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(call)),
            ("tool_call_id", pa.string()),
            ("name", pa.string()),
            ("weight", pa.int8()),
        ]
    )
    return pa.schema(
        [
            ("id", pa.string()),
            ("messages", pa.list_(message)),
            ("tools", pa.string()),  # JSON: a tool's parameters are a schema of any shape
            ("n_copies", pa.int32()),  # times it is seen an epoch, of its source's weight
            ("corrections", pa.list_(pa.string())),
            ("source", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
        ]
    )


def rejected_schema() -> pa.Schema:
    """What was not kept: a `reason` to count by, a `detail` of this one, and the row as read."""
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("raw", pa.string()),
        ]
    )


class Rejected(Exception):
    """Why a conversation cannot be used; the message is its reason on file."""


@dataclass(frozen=True)
class Record:
    """One line of a source file as it was read."""

    source_file: str
    source_line: int
    """Counted from 1."""
    raw: str
    """The line without its end; bytes that are not UTF-8 appear as U+FFFD."""
    is_utf8: bool


def read_records(path: Path) -> Iterator[Record]:
    """The non-empty lines of a JSON Lines file.

    Raises:
        StageError: there is no such file.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise StageError(
            "a dataset file cannot be read",
            where=f"datasets.<name>.files, {path}",
            found=error.strerror,
            to_fix="check the path; it is taken from the folder Snakemake runs in",
        ) from error
    with stream:
        for number, line in enumerate(stream, start=1):
            raw = line.rstrip(b"\r\n")
            if not raw.strip():
                continue
            text = raw.decode("utf-8", errors="replace")
            yield Record(str(path), number, text, is_utf8=text.encode() == raw)


def parse_messages(record: Record) -> tuple[list[dict[str, str]], str | None]:
    """The messages of a record, normalized, and its `group`.

    Text is stripped at both ends (mistral-common drops white space at the end of an answer anyway);
    anything else stays as it is.

    Raises:
        Rejected: with the reason.
    """
    if not record.is_utf8:
        raise Rejected("not UTF-8")
    try:
        content = json.loads(record.raw)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise Rejected("not JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise Rejected("no list `messages`")
    messages = [_message(message) for message in content["messages"]]
    check_order([message["role"] for message in messages])
    group = content.get("group")
    if group is not None:
        group = str(group)
        _check_encodes(group)
    return messages, group


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Rejected("a message is no object")
    role, text = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Rejected(f"unknown role {str(role)[:40]!r}")
    if not isinstance(text, str):
        raise Rejected("a message has no text")
    text = text.strip()
    if not text:
        raise Rejected("an empty message")
    _check_encodes(text)
    return {"role": role, "content": text}


def _check_encodes(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("a lone surrogate in the text") from error


def check_order(roles: list[str]) -> None:
    """An optional system message, then user and assistant in turns, ending with the assistant.

    Raises:
        Rejected: otherwise.
    """
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise Rejected("no turn")
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise Rejected(f"wrong role order: {role} where {expected} is expected")
    if turns[-1] != "assistant":
        raise Rejected("the last message is not an answer")


def conversation_id(messages: list[dict[str, str]]) -> str:
    """16 hexadecimal digits of the content's SHA-256: equal content, equal id."""
    text = json.dumps(messages, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_split(key: str, *, validation_fraction: float, test_fraction: float) -> str:
    """`train`, `validation` or `test`, by the key's hash alone.

    So a conversation stays in its split however the dataset grows, and equal keys stay together.
    """
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if position < test_fraction:
        return "test"
    if position < test_fraction + validation_fraction:
        return "validation"
    return "train"
