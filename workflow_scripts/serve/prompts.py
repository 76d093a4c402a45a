"""A chat as token ids, exactly as in training.

llama-cpp-python renders the GGUF's chat template as text and reads the control tokens back out of
it; a user who writes `[INST]` or `</s>` then writes control tokens. mistral-common rendered the
training data, so it renders here as well, from the tokenizer file that the release carries. It
sets the one BOS, and a text never makes a control token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from workflow_scripts.chats.messages import CALL_ID
from workflow_scripts.models.tokenizer_files import (
    find_tokenizer,
    load_mistral_tokenizer,
    tokenizer_version,
)

if TYPE_CHECKING:
    from llama_cpp.llama_types import ChatCompletionTool


class CalledFunction(TypedDict):
    """What a tool call calls."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(TypedDict):
    """A tool call in OpenAI's shape."""

    id: str
    type: str
    function: CalledFunction


class Message(TypedDict):
    """A message as OpenAI's clients send it. mistral-common checks it when it is rendered."""

    role: str
    content: NotRequired[object]
    """Text, its parts, or None."""
    tool_calls: NotRequired[list[ToolCall] | None]
    tool_call_id: NotRequired[str | None]
    refusal: NotRequired[str | None]


class UnusableChat(ValueError):
    """Why a conversation has no prompt."""


class Prompts:
    """Renders what comes before an answer.

    Args:
        folder: of the release: Mistral's own tokenizer file.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_mistral_tokenizer(folder, for_training=False)
        path = find_tokenizer(folder)
        self.version = tokenizer_version(path)
        self.has_leading_space = self.version != "tekken"
        """Whether an answer's first token begins with SentencePiece's space."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ChatCompletionTool] | None = None,
    ) -> list[int]:
        """Token ids, BOS first, up to where the answer begins.

        Args:
            messages: in OpenAI's shape; `developer` is taken for `system`.
            tools: in OpenAI's shape.
        Raises:
            UnusableChat: mistral-common refuses the conversation, or v1 is offered tools.
        """
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        if tools and self.version == "v1":
            raise UnusableChat("a model of tokenizer v1 has no tools")
        try:
            request = ChatCompletionRequest.from_openai(
                messages=[_as_trained(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
            )
            return list(self._tokenizer.encode_chat_completion(request).tokens)
        # pydantic's errors are ValueErrors; a message without `role` is a KeyError.
        except (MistralCommonException, ValueError, KeyError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UnusableChat(f"the conversation cannot be rendered: {reason}") from error

    @property
    def tool_calls_id(self) -> int | None:
        """The control token that opens tool calls; None for v1."""
        return getattr(self._tokenizer.instruct_tokenizer, "TOOL_CALLS", None)


def call_id(text: str) -> str:
    """An id as Mistral's templates want it, nine letters or digits: itself, or one that stands for
    it."""
    return text if CALL_ID.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _as_trained(message: Message) -> dict[str, Any]:  # untyped: mistral-common takes such
    """A message of a client as mistral-common takes it: nulls left out, ids of nine characters."""
    kept: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
    if kept.get("role") == "developer":
        kept["role"] = "system"
    if kept.get("role") == "assistant":
        kept.pop("refusal", None)
        if kept.get("content") == "":
            del kept["content"]
        if kept.get("tool_calls"):
            kept["tool_calls"] = [
                {**call, "id": call_id(call["id"])} for call in kept["tool_calls"]
            ]
        else:
            kept.pop("tool_calls", None)
    if "tool_call_id" in kept:
        kept["tool_call_id"] = call_id(kept["tool_call_id"])
    return kept
