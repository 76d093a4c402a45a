"""Rendering: a conversation as token ids by mistral-common, with the spans that training may learn.

The library's own fine-tuning mode renders the whole conversation in one call, so that its rules
(where the system prompt goes, what is stripped) hold as they are. The spans are read off the same
call: a recording tokenizer notes how long each answer was, as it was encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer


class CannotRender(Exception):
    """mistral-common refuses the conversation; the message is its reason."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as the model sees it."""

    input_ids: list[int]
    supervised_spans: list[tuple[int, int]]
    """Half-open ranges: each answer with its closing EOS, in order."""


class Renderer:
    """Renders conversations with one tokenizer.

    Args:
        tokenizer: in fine-tuning mode; this renderer listens to its answers from now on.
    """

    def __init__(self, tokenizer: MistralTokenizer) -> None:
        self._tokenizer = tokenizer
        self._answers: list[list[int]] = []
        instruct = tokenizer.instruct_tokenizer
        self.eos_id: int = instruct.tokenizer.eos_id
        encode = instruct.encode_assistant_message

        def encode_and_record(*arguments: Any, **options: Any) -> list[int]:
            token_ids = encode(*arguments, **options)
            self._answers.append(list(token_ids))
            return token_ids

        instruct.encode_assistant_message = encode_and_record

    def render(self, messages: Sequence[dict[str, str]]) -> Rendering:
        """Token ids and supervised spans of one conversation.

        Raises:
            CannotRender: the library refuses it, or it holds nothing to learn.
        """
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from pydantic import ValidationError

        self._answers.clear()
        try:
            request = ChatCompletionRequest.from_openai(messages=list(messages))
            input_ids = self._tokenizer.encode_chat_completion(request).tokens
        except (MistralCommonException, ValidationError, ValueError) as error:
            raise CannotRender(f"mistral-common: {error}".splitlines()[0]) from error
        spans = locate(self._answers, input_ids, eos_id=self.eos_id)
        if not spans:
            raise CannotRender("no supervised token")
        return Rendering(input_ids, spans)


def locate(
    answers: Sequence[Sequence[int]], input_ids: Sequence[int], *, eos_id: int
) -> list[tuple[int, int]]:
    """Where each answer stands in the document.

    Every answer ends in EOS, and EOS stands nowhere else (SentencePiece and tekken never make a
    control token of text), so the n-th EOS closes the n-th answer.

    Args:
        answers: token ids of each answer, its EOS included, in order.
        input_ids: of the whole conversation.
    Returns:
        Half-open ranges.
    """
    ends = [position + 1 for position, token in enumerate(input_ids) if token == eos_id]
    assert len(ends) == len(answers), (len(ends), len(answers))
    spans = []
    for answer, end in zip(answers, ends, strict=True):
        start = end - len(answer)
        assert list(input_ids[start:end]) == list(answer)
        spans.append((start, end))
    return spans
