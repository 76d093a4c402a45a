"""Splits, ids and copies of conversations, all decided by hashes.

So none of them changes when the dataset grows, or depends on the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from workflow_scripts.chats.conversations import Conversation
from workflow_scripts.chats.messages import Message
from workflow_scripts.chats.rejections import Rejected


def conversation_id(messages: Sequence[Message], tools: str | None = None) -> str:
    """Return 16 hexadecimal digits of the content's SHA-256: equal content, equal id."""
    content: object = messages if tools is None else [messages, tools]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_key(conversation: Conversation, split_by: str) -> str:
    """Return the text that is hashed to choose a conversation's split.

    The first user turn counts without its case and white space, so that equal questions are in one
    split.

    Raises:
        Rejected: the split is by a field that the record does not have.
    """
    if split_by != "first_user_turn":
        value = conversation.fields.get(split_by)
        if value is None:
            raise Rejected("no field to split by", split_by)
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    messages = conversation.messages
    first = next((one for one in messages if one["role"] == "user"), messages[0])
    return " ".join((first["content"] or "").casefold().split())


def choose_split(key: str, *, validation_fraction: float, test_fraction: float) -> str:
    """Return `train`, `validation` or `test`, by the hash of the key.

    Conversations with equal keys are in one split.
    """
    position = _hashed_fraction(key)
    if position < test_fraction:
        return "test"
    return "validation" if position < test_fraction + validation_fraction else "train"


def n_copies(identity: str, weight: float) -> int:
    """Return how often a training conversation is seen: its source's weight, rounded by a hash.

    A weight of 0.3 keeps three conversations in ten, always the same ones.
    """
    return int(weight) + (_hashed_fraction(f"copies {identity}") < weight % 1)


def _hashed_fraction(text: str) -> float:
    """Return a number from 0 to 1, spread evenly over texts."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
