"""Token parity: the documents to compare, the reference tokens, and known template differences.

mistral-common is the reference. A chat template produces text, so it cannot distinguish a control
token from its spelling, and the official templates leave out some of what mistral-common does to
tool results. This module recognizes such conversations, so a gate compares all others with the
template and counts these.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from workflow_scripts.chats.messages import Message
from workflow_scripts.log import StageError
from workflow_scripts.tokens.documents import Document, Documents, conversation_batches
from workflow_scripts.tokens.rendering import chat_request, openai_message

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

Decode = Callable[[Sequence[int]], str]

COLUMNS = ["id", "messages", "tools"]
CONTEXT_TOKENS = 16  # shown before the first token that differs
SHOWN_TOKENS = 6  # shown from that token on


class Chat(NamedTuple):
    """A conversation and its document."""

    messages: list[Message]
    tools: str | None
    document: Document

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or any(message.get("tool_calls") for message in self.messages)


def sample(clean: Path, documents: Documents, limit: int | None) -> Iterator[Chat]:
    """Yield a sample of a split's documents with their conversations, in the order of the file.

    The conversations are streamed, because a million of them do not fit into memory.

    Args:
        clean: the split's file of `clean_dataset`.
        limit: see `choose_sample`.
    Raises:
        StageError: the file lacks a document's conversation.
    """
    with_tools = tool_users(clean)
    uses_tools = np.array([name in with_tools for name in documents.ids], dtype=bool)
    chosen = choose_sample(documents.lengths, uses_tools, limit)
    wanted = {documents.ids[index]: int(index) for index in chosen}
    for batch in conversation_batches(clean, COLUMNS):
        ids = batch.column("id").to_pylist()
        for row, conversation_id in enumerate(ids):
            if conversation_id in wanted:
                messages = batch.column("messages")[row].as_py()
                tools = batch.column("tools")[row].as_py()
                yield Chat(messages, tools, documents[wanted.pop(conversation_id)])
    if wanted:
        raise StageError(
            "documents have no conversation",
            where=clean,
            found=f"{len(wanted)} ids are missing, the first is {next(iter(wanted))}",
            to_fix="render again: tokens and conversations come from different runs",
        )


def tool_users(clean: Path) -> set[str]:
    """Return the ids of the conversations in which a tool is offered or called."""
    users: set[str] = set()
    for batch in conversation_batches(clean, COLUMNS):
        messages = batch.column("messages")
        calls = pc.fill_null(pc.list_value_length(messages.flatten().field("tool_calls")), 0)
        calling = pc.list_parent_indices(messages).filter(pc.greater(calls, 0))
        offered = pc.indices_nonzero(pc.is_valid(batch.column("tools")))
        rows = pa.concat_arrays([calling.cast(pa.uint64()), offered]).unique()
        users.update(batch.column("id").take(rows).to_pylist())
    return users


def choose_sample(lengths: np.ndarray, uses_tools: np.ndarray, limit: int | None) -> np.ndarray:
    """Choose documents to compare: a tenth are the longest, a third use tools, the rest are spread
    evenly over the file.

    Args:
        lengths: (documents,) tokens.
        uses_tools: (documents,) bool.
        limit: size of the sample; None is every document.
    Returns:
        Indices, ascending.
    """
    n_documents = len(lengths)
    if limit is None or limit >= n_documents:
        return np.arange(n_documents)
    longest = np.argsort(-lengths.astype(np.int64), kind="stable")[: -(-limit // 10)]
    with_tools = np.setdiff1d(np.flatnonzero(uses_tools), longest)
    chosen = np.union1d(longest, spread(with_tools, min(limit // 3, limit - len(longest))))
    rest = np.setdiff1d(np.arange(n_documents), chosen)
    return np.union1d(chosen, spread(rest, limit - len(chosen)))


def spread(indices: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` of the indices, evenly spaced."""
    if len(indices) <= limit:
        return indices
    return indices[np.arange(limit) * len(indices) // max(limit, 1)]


def official_tokens(
    official: MistralTokenizer, messages: Sequence[Message], tools: str | None
) -> list[int]:
    """Return the token ids by mistral-common, with validation and without our cache.

    Args:
        official: tokenizer in fine-tuning mode.
    """
    if is_text(messages):
        encode = official.instruct_tokenizer.tokenizer.encode
        return encode(messages[0]["content"] or "", bos=True, eos=True)
    return official.encode_chat_completion(chat_request(messages, tools)).tokens


def is_text(messages: Sequence[Message]) -> bool:
    return [message["role"] for message in messages] == ["text"]


def template_arguments(
    messages: Sequence[Message], tools: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:  # untyped: what transformers takes
    """Return messages and tools for a chat template, with JSON formatted as by mistral-common.

    A template copies JSON unchanged; mistral-common parses it and serializes it again.
    """
    from mistral_common.protocol.instruct.tool_calls import Tool

    plain = [openai_message(message) for message in messages]
    for message in plain:
        for call in message.get("tool_calls", []):
            arguments = _reserialized(call["function"]["arguments"] or "{}")
            call["function"] = call["function"] | {"arguments": arguments}
    if not tools:
        return plain, None
    return plain, [
        Tool.from_openai(tool).model_dump(exclude={"function": {"strict"}})
        for tool in json.loads(tools)
    ]


def why_template_differs(
    messages: Sequence[Message], tools: str | None, *, official: MistralTokenizer
) -> str | None:
    """Return why an official template differs from mistral-common; None if it must agree.

    This does not look for control tokens in the texts.
    """
    version = official.version.value
    is_sentencepiece = _is_sentencepiece(official)
    if is_text(messages):
        # A SentencePiece tokenizer.json adds the leading space only if the text has none.
        begins = (messages[0]["content"] or "").startswith((" ", "▁"))
        return "a text that begins with a space" if is_sentencepiece and begins else None
    last_user = last_question(messages)
    for at, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if version == "v2" and at < last_user and (role == "tool" or message.get("tool_calls")):
            continue  # left out by both
        if role == "tool" and version in ("v2", "v3") and _is_rewritten(content):
            return "a tool result that is JSON"
        if role == "system" and content == "" and version == "v7" and is_sentencepiece:
            return "an empty system prompt"
        if role == "assistant" and version != "v1" and (content or "").endswith(" "):
            return "an answer that ends in a space"
        for call in message.get("tool_calls") or ():
            if not _is_json(call["function"]["arguments"] or "{}"):
                return "tool arguments that are not JSON"
    return None


def texts_of(messages: Sequence[Message], tools: str | None) -> Iterator[str]:
    """Yield every text of a conversation that could contain the spelling of a control token."""
    for message in messages:
        yield message.get("content") or ""
        for call in message.get("tool_calls") or ():
            yield call["function"]["name"]
            yield call["function"]["arguments"] or ""
    if tools:
        yield _reserialized(tools)


def learnable_answers(messages: Sequence[Message], *, version: str) -> list[tuple[bool, bool]]:
    """Return (may be learned, is of the last turn) for each answer of a rendered conversation.

    Consecutive answers are one answer.
    """
    if is_text(messages):
        return [(True, True)]
    last_user = last_question(messages)
    answers = []
    for role, group in itertools.groupby(enumerate(messages), key=lambda pair: pair[1]["role"]):
        if role != "assistant":
            continue
        joined = list(group)
        is_last = joined[0][0] > last_user
        calls_tools = any(message.get("tool_calls") for _, message in joined)
        if version == "v2" and calls_tools and not is_last:
            continue  # v2 leaves out the tool calls of earlier turns
        answers.append((all(message.get("weight") != 0 for _, message in joined), is_last))
    return answers


def last_question(messages: Sequence[Message]) -> int:
    """Return the index of the last user message; −1 if there is none."""
    return max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)


def compare(
    found: Sequence[int],
    expected: Sequence[int],
    *,
    what: str,
    where: str,
    decode: Decode,
    to_fix: str,
) -> None:
    """Compare two renderings.

    Args:
        what: first line of the error message.
        decode: decodes tokens to text, control tokens included.
    Raises:
        StageError: they differ; the message shows the first different tokens as text.
    """
    if list(found) == list(expected):
        return
    at = next(
        (
            position
            for position, (left, right) in enumerate(zip(found, expected, strict=False))
            if left != right
        ),
        min(len(found), len(expected)),
    )
    before = decode(found[max(0, at - CONTEXT_TOKENS) : at])
    raise StageError(
        what,
        where=f"{where}, token {at}, after {before!r}",
        found=_shown(found[at : at + SHOWN_TOKENS], decode),
        expected=_shown(expected[at : at + SHOWN_TOKENS], decode),
        to_fix=to_fix,
    )


def _shown(token_ids: Sequence[int], decode: Decode) -> str:
    return " ".join(f"{token}={decode([token])!r}" for token in token_ids) or "the end"


def _is_rewritten(tool_result: str | None) -> bool:
    """True if mistral-common parses a tool result as JSON and a template leaves it as text.

    The templates recognize only integers and decimal numbers in Python's spelling. mistral-common
    treats an empty result as an empty object.
    """
    if not tool_result:
        return True
    if not _is_json(tool_result):
        return False
    value = json.loads(tool_result)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not (is_number and str(value) == tool_result)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _reserialized(text: str) -> str:
    return json.dumps(json.loads(text), ensure_ascii=False) if _is_json(text) else text


def _is_sentencepiece(official: MistralTokenizer) -> bool:
    from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece_tokenizer

    return is_sentencepiece_tokenizer(official.instruct_tokenizer.tokenizer)
