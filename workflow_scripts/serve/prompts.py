"""A chat as token ids, exactly as in training.

llama-cpp-python renders the GGUF's chat template as text and parses control tokens from it, so a
user who writes `[INST]` or `</s>` writes control tokens. mistral-common rendered the training data,
and it renders here too, with the tokenizer file of the release. It adds exactly one BOS, and text
never becomes a control token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from workflow_scripts.chats.messages import CALL_ID, Message
from workflow_scripts.models.tokenizer_files import (
    find_tokenizer,
    load_mistral_tokenizer,
    tokenizer_version,
)

if TYPE_CHECKING:
    from llama_cpp.llama_types import ChatCompletionTool


class UnusableChat(ValueError):
    """A conversation that cannot be rendered; the message is the reason."""


class Prompts:
    """Renders prompts: everything before an answer.

    Args:
        folder: the release, which has Mistral's own tokenizer file.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_mistral_tokenizer(folder, for_training=False)
        self.version = tokenizer_version(find_tokenizer(folder))
        self.has_leading_space = self.version != "tekken"
        """An answer's first token starts with SentencePiece's space."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ChatCompletionTool] | None = None,
    ) -> list[int]:
        """Token ids from BOS to the start of the answer.

        Args:
            messages: in OpenAI's shape; the role `developer` becomes `system`.
            tools: in OpenAI's shape.
        Raises:
            UnusableChat: mistral-common refuses the conversation, or a v1 model is offered tools.
        """
        if tools and self.version == "v1":
            raise UnusableChat("a model with tokenizer v1 cannot use tools")
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
    """A tool call's id in Mistral's form, nine letters or digits: the id itself, or its hash."""
    return text if CALL_ID.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _as_trained(message: Message) -> dict[str, Any]:  # untyped: for mistral-common
    """A client's message in mistral-common's form: without nulls, ids of nine characters."""
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
