"""Rendering: a conversation as token ids by mistral-common, with the spans that training may learn.

The library's own templates are used as they are: its tokenizer writes the conversation as a
skeleton, control tokens with a stand-in for each text, and the texts are put in by a faster encoder
of the same ids (`segment_cache`). So where the system prompt goes, what is stripped and how a tool
call is spelled is never said twice. Left out is what a plain chat does not need: validation,
normalization, and decoding the result, three quarters of the library's time.

The spans are read off the same call: a recording tokenizer notes how long each answer was. Plain
chats of one shape (who speaks when) have one skeleton, so the library is asked once for each.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workflow_scripts.chats.messages import Message, ToolCall
from workflow_scripts.tokens.segment_cache import TOKEN_BYTES, TextEncoder

if TYPE_CHECKING:
    import numpy as np
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TURN = ("user", "assistant")
# Stands for the content of a message while the library writes a chat's shape; private characters,
# so that no template has them. Only marks are looked for, in texts that hold nothing of the user's.
MARK = "\ue000{}\ue001"
MARKED = re.compile("\ue000([0-9]+)\ue001")


class CannotRender(Exception):
    """Why a conversation has no tokens.

    Args:
        reason: the same words for all that fail alike, to count by.
        detail: what it was in this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, eq=False)
class Rendering:
    """A conversation as the model sees it."""

    input_ids: np.ndarray
    """(n_tokens,) int32."""
    supervised_spans: list[tuple[int, int]]
    """Half-open ranges: each answer that is learned with its closing EOS, in order."""

    @property
    def n_supervised_tokens(self) -> int:
        return sum(end - start for start, end in self.supervised_spans)


@dataclass(frozen=True)
class _Answer:
    """One assistant message as the library encoded it."""

    skeleton: list[int]
    """Empty where the template leaves the message out (v2: tool calls of earlier turns)."""
    is_of_last_turn: bool


@dataclass(frozen=True)
class _Written:
    """A conversation as the library wrote it, its texts left out."""

    skeleton: list[int]
    """Token ids; −1 − i stands for the i-th text."""
    texts: list[list[str | int]]
    """Each in its parts: text of the template's, or the number of a message's content."""
    answers: list[_Answer]
    places: list[tuple[int, int] | None]
    """Of the answers in the skeleton."""


class Renderer:
    """Renders conversations with one tokenizer, which stays as it is.

    Args:
        tokenizer: in fine-tuning mode.
        supervise: see `RenderingSettings`.
    """

    def __init__(
        self,
        tokenizer: MistralTokenizer,
        *,
        supervise: Literal["all_turns", "last_turn"] = "all_turns",
    ) -> None:
        from mistral_common.protocol.instruct import normalize

        self._text_encoder = TextEncoder(tokenizer.instruct_tokenizer.tokenizer)
        self._supervises_last_turn = supervise == "last_turn"
        # Copies of our own, so that the caller's tokenizer never answers with stand-ins.
        self._tokenizer = copy.copy(tokenizer)
        # Some of its methods are replaced below, one of which its base class does not declare.
        self._instruct: Any = copy.copy(tokenizer.instruct_tokenizer)
        self._instruct.tokenizer = copy.copy(tokenizer.instruct_tokenizer.tokenizer)
        self._tokenizer.instruct_tokenizer = self._instruct
        self.bos_id: int = self._instruct.tokenizer.bos_id
        self.eos_id: int = self._instruct.tokenizer.eos_id
        # What the normalizer of a plain chat does is known up to v13: v7 and later keep the system
        # message in its place, those before hand it over beside the messages.
        self._normalizer = tokenizer._instruct_request_normalizer
        self._knows_normalizer = type(self._normalizer) in (
            normalize.InstructRequestNormalizer,
            normalize.InstructRequestNormalizerV7,
            normalize.InstructRequestNormalizerV13,
        )
        self._texts: list[str] = []
        self._answers: list[_Answer] = []
        self._ahead: dict[str, bytes] = {}
        self._shapes: dict[tuple[str, ...], _Written] = {}
        """By the roles of a plain chat."""
        self._control = functools.cache(lambda token: array("i", [token]).tobytes())
        self._listen()

    def encode_ahead(self, texts: Iterable[str]) -> None:
        """Encode what is going to be rendered, all at once; forgets what was encoded before."""
        ahead = list(dict.fromkeys(texts))
        self._ahead = dict(zip(ahead, self._text_encoder.encode_all(ahead), strict=True))

    def render(self, messages: Sequence[Message], tools: str | None = None) -> Rendering:
        """Token ids and supervised spans of one conversation.

        Args:
            tools: JSON, a list in OpenAI's shape.
        Raises:
            CannotRender: the library refuses it, or it holds nothing to learn.
        """
        if len(messages) == 1 and messages[0]["role"] == "text":
            return self._render_text(messages[0]["content"] or "")
        written = self._written(messages, tools)
        texts = [
            self._encode_text(
                "".join(
                    (messages[part]["content"] or "") if isinstance(part, int) else part
                    for part in parts
                )
            )
            for parts in written.texts
        ]
        pieces = [
            self._control(token) if token >= 0 else texts[-token - 1] for token in written.skeleton
        ]
        starts = [0, *itertools.accumulate(len(piece) // TOKEN_BYTES for piece in pieces)]
        is_learned = self._choose(messages, written.answers)
        spans = [
            (starts[place[0]], starts[place[1]])
            for place, learned in zip(written.places, is_learned, strict=True)
            if place is not None and learned
        ]
        if not spans:
            raise CannotRender("no supervised token", f"{len(is_learned)} answers, none learned")
        return Rendering(_token_ids(pieces), spans)

    def _encode_text(self, text: str) -> bytes:
        encoded = self._ahead.get(text)
        return self._text_encoder.encode(text) if encoded is None else encoded

    def _render_text(self, text: str) -> Rendering:
        """A plain text: every token is learned but the BOS before it."""
        encoded = self._encode_text(text)
        if not encoded:
            raise CannotRender("no supervised token", "an empty text")
        token_ids = _token_ids([self._control(self.bos_id), encoded, self._control(self.eos_id)])
        return Rendering(token_ids, [(1, len(token_ids))])

    def _listen(self) -> None:
        """Let our copy of the library's tokenizer write skeletons and tell of the answers."""
        encode_answer = self._instruct.encode_assistant_message

        def encode_text(s: str, bos: bool, eos: bool) -> list[int]:
            assert not bos and not eos
            self._texts.append(s)
            return [-len(self._texts)]

        def encode_and_record(message: Any, is_before_last_user_message: bool) -> list[int]:
            skeleton = encode_answer(message, is_before_last_user_message)
            self._answers.append(_Answer(list(skeleton), not is_before_last_user_message))
            return skeleton

        self._instruct.tokenizer.encode = encode_text
        self._instruct.encode_assistant_message = encode_and_record
        # The library decodes what it made, for a property that nothing here reads.
        self._instruct.decode = lambda *_, **__: ""

    def _written(self, messages: Sequence[Message], tools: str | None) -> _Written:
        """A conversation as the library writes it: asked of it, or known by its shape."""
        if not (self._knows_normalizer and is_plain(messages, tools)):
            return self._ask(self._validated_skeleton, messages, tools)
        # What some versions do without a system prompt of no words, and with a space at the end of
        # an answer, depends on the text, and a shape cannot tell.
        if any(not one["content"] or one["content"].endswith(" ") for one in messages):
            return self._ask(self._plain_skeleton, messages)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._shapes:
            marked: list[Message] = [
                {"role": role, "content": MARK.format(number)} for number, role in enumerate(roles)
            ]
            written = self._ask(self._plain_skeleton, marked)
            parts = [_parts(str(text)) for (text,) in written.texts]
            self._shapes[roles] = dataclasses.replace(written, texts=parts)
        return self._shapes[roles]

    def _ask(self, write: Callable[..., list[int]], *conversation: Any) -> _Written:
        self._texts.clear()
        self._answers.clear()
        skeleton = write(*conversation)
        answers = list(self._answers)
        places = locate([answer.skeleton for answer in answers], skeleton, eos_id=self.eos_id)
        return _Written(skeleton, [[text] for text in self._texts], answers, places)

    def _plain_skeleton(self, messages: Sequence[Message]) -> list[int]:
        """What `encode_chat_completion` does with a plain chat, its checks and copies left out."""
        from mistral_common.protocol.instruct.messages import (
            AssistantMessage,
            SystemMessage,
            UserMessage,
        )
        from mistral_common.protocol.instruct.request import InstructRequest, ModelSettings

        # Type checkers do not see the classmethods of these models.
        kinds: dict[str, Any] = {
            "system": SystemMessage,
            "user": UserMessage,
            "assistant": AssistantMessage,
        }
        system_prompt = None
        if messages[0]["role"] == "system" and not self._normalizer._system_prompt_in_begin:
            system_prompt = messages[0]["content"]
            messages = messages[1:]
        request: Any = InstructRequest.model_construct(
            messages=[
                kinds[message["role"]].model_construct(content=message["content"])
                for message in messages
            ],
            system_prompt=system_prompt,
            settings=ModelSettings.none(),
        )
        return self._instruct.encode_instruct(request).tokens

    def _validated_skeleton(self, messages: Sequence[Message], tools: str | None) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from pydantic import ValidationError

        try:
            return self._tokenizer.encode_chat_completion(chat_request(messages, tools)).tokens
        except (MistralCommonException, ValidationError, ValueError) as error:
            raise CannotRender(
                f"mistral-common refuses it ({type(error).__name__})",
                next(iter(str(error).splitlines()), ""),
            ) from error

    def _choose(self, messages: Sequence[Message], answers: Sequence[_Answer]) -> list[bool]:
        """Which of the recorded answers training learns.

        The library joins answers that follow each other, so weights are those of the joined ones.
        """
        is_answer = itertools.groupby(messages, key=lambda message: message["role"])
        weights = [
            {message.get("weight") for message in joined}
            for role, joined in is_answer
            if role == "assistant"
        ]
        chosen = []
        for answer, joined in zip(answers, weights, strict=True):
            is_masked = 0 in joined
            if is_masked and len(joined) > 1:
                raise CannotRender(
                    "answers of different weight follow each other", "they become one answer"
                )
            chosen.append(
                not is_masked and (answer.is_of_last_turn or not self._supervises_last_turn)
            )
        return chosen


def chat_request(messages: Sequence[Message], tools: str | None) -> Any:
    """A conversation of `clean_schema` as the library's request.

    Raises:
        ValueError: pydantic's among them.
        MistralCommonException: a message that the library does not know.
    """
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    return ChatCompletionRequest.from_openai(
        messages=[openai_message(message) for message in messages],
        tools=json.loads(tools) if tools else None,
    )


def openai_message(message: Message) -> dict[str, Any]:  # untyped: what the libraries take
    """A message without what is null in its table, and without our own `weight`."""
    kept = _without_nulls(message)
    kept.pop("weight", None)
    if "tool_calls" in kept:
        kept["tool_calls"] = [_without_nulls(call) for call in kept["tool_calls"]]
    return kept


def is_plain(messages: Sequence[Message], tools: str | None) -> bool:
    """Whether a conversation is an optional system prompt and then question and answer in turns,
    each a text: what the library takes without a change of its own."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return (
        not tools
        and len(turns) > 0
        and len(turns) % 2 == 0
        and isinstance(messages[0].get("content"), str)
        and all(
            message["role"] == TURN[number % 2]
            and isinstance(message.get("content"), str)
            and message["content"] != ""
            and not message.get("tool_calls")
            for number, message in enumerate(turns)
        )
    )


def locate(
    answers: Sequence[Sequence[int]], skeleton: Sequence[int], *, eos_id: int
) -> list[tuple[int, int] | None]:
    """Where each answer stands in the conversation.

    Every answer ends in EOS, and EOS stands nowhere else (a text is a stand-in here, and never
    makes a control token), so the n-th EOS closes the n-th answer.

    Args:
        answers: each answer, its EOS included, in order; one that was left out is empty.
        skeleton: of the whole conversation.
    Returns:
        Half-open ranges in the skeleton; None for an answer that was left out.
    """
    ends = iter([place + 1 for place, token in enumerate(skeleton) if token == eos_id])
    places: list[tuple[int, int] | None] = []
    for answer in answers:
        if not answer:
            places.append(None)
            continue
        end = next(ends)
        start = end - len(answer)
        assert list(skeleton[start:end]) == list(answer)
        places.append((start, end))
    assert next(ends, None) is None, "an EOS that closes no answer"
    return places


def _parts(text: str) -> list[str | int]:
    """A text the library was going to encode, its marks as the numbers of messages."""
    parts = MARKED.split(text)  # between two marks, or none, there is always a text
    return [int(part) if at % 2 else part for at, part in enumerate(parts) if part]


def _without_nulls(row: Message | ToolCall) -> dict[str, Any]:  # untyped: for `openai_message`
    return {key: value for key, value in row.items() if value is not None}


def _token_ids(parts: Sequence[bytes]) -> np.ndarray:
    import numpy as np

    return np.frombuffer(b"".join(parts), dtype=np.int32)
