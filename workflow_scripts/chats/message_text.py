"""Texts of messages: joined from parts, repaired, and checked to be UTF-8 or JSON that can be
rendered."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from workflow_scripts.chats import schemas
from workflow_scripts.chats.rejections import Rejected

BETWEEN_JOINED = "\n\n"  # as mistral-common joins
# Rendering reads JSON again, by recursion. Python's limit is far above this depth.
MAX_NESTING = 100

Repair = Callable[[str], str]
# Phrases that name what was corrected, in order; a dict, so that each occurs once.
Corrections = dict[str, None]


def read_text(content: Any, repair: Repair, corrections: Corrections) -> str:
    """Return a message's text, repaired; an empty text if it is only white space."""
    if not isinstance(content, str):
        content = "" if content is None else joined_parts(content)
    text = repair(encodable(content, corrections))
    return "" if text.isspace() else text


def joined_parts(content: Any) -> str:
    """Return the text of a message that may be in parts, joined as mistral-common joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Rejected("content is not text", schemas.json_type(content))
    for part in content:
        if not (isinstance(part, str) or is_text_part(part)):
            kind = part.get("type") if isinstance(part, dict) else schemas.json_type(part)
            raise Rejected("content is not text", f"part {shown(kind)}")
    texts = (part if isinstance(part, str) else part["text"] for part in content)
    return BETWEEN_JOINED.join(text for text in texts if text)


def is_text_part(part: Any) -> bool:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return is_text and isinstance(part.get("text"), str)


def encodable(text: str, corrections: Corrections) -> str:
    """Return the text without surrogates, so that UTF-8 can encode it.

    Pairs are joined. A lone surrogate cannot be repaired, and U+FFFD in its place would be taught
    as an answer, so its text is rejected.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError as error:
            raise Rejected("half a character", error.reason) from error
        corrections["halves of characters joined"] = None
    return text


def json_content(text: str) -> Any:
    """Return the value that rendering will read from a text if it is JSON; None if it is not."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        raise Rejected("JSON that cannot be rendered", type(error).__name__) from error
    check_json(value)
    return value


def check_json(value: Any) -> None:
    """Check that a JSON value can be written as UTF-8, and read and written by recursion."""
    level: list[Any] = [[value]]
    depth = 0
    while level and depth <= MAX_NESTING:
        depth += 1
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [
            item for item in itertools.chain.from_iterable(inner) if isinstance(item, dict | list)
        ]
    if level:
        raise Rejected("JSON that cannot be rendered", f"more than {MAX_NESTING} levels")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Rejected("half a character", error.reason) from error


def shown(value: Any) -> str:
    """Return a value as a detail shows it: short, and in ASCII."""
    return ascii(value)[:80]
