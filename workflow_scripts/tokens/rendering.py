"""Rendering: a conversation as token ids by mistral-common, with its supervised spans.

mistral-common's own templates are used unchanged. Its tokenizer writes the conversation as a
skeleton: control tokens, with a placeholder for each text. Its encoder then fills in the texts. So
the rules for the system prompt, for stripping and for tool calls are not written a second time
here. Plain chats skip validation, normalization and decoding of the result, which take three
quarters of the library's time.

The spans come from the same call: a recording tokenizer notes the length of each answer. Plain
chats with the same sequence of roles have the same skeleton, so the library is called once per
sequence.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from workflow_scripts.chats.messages import Message, ToolCall

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TURN = ("user", "assistant")
# Replaces a message's content when the library writes the skeleton of a sequence of roles. No
# template has these private-use characters, and texts with marks contain no user text.
MARK = "\ue000{}\ue001"
MARKED = re.compile("\ue000([0-9]+)\ue001")


class CannotRender(Exception):
    """The conversation cannot be rendered.

    Args:
        reason: the same text for all conversations with this problem, for counting.
        detail: the problem in this conversation.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, eq=False)
class Rendering:
    """A rendered conversation."""

    input_ids: np.ndarray
    """(n_tokens,) int32."""
    supervised_spans: list[tuple[int, int]]
    """Half-open ranges, in order: each supervised answer with its closing EOS."""

    @property
    def n_supervised_tokens(self) -> int:
        return sum(end - start for start, end in self.supervised_spans)


@dataclass(frozen=True)
class _Answer:
    """One assistant message as the library encoded it."""

    skeleton: list[int]
    """Empty if the template leaves the message out (v2: tool calls of earlier turns)."""
    is_of_last_turn: bool


@dataclass(frozen=True)
class _Written:
    """A conversation as the library wrote it, with placeholders for its texts."""

    skeleton: list[int]
    """Token ids; −1 − i is the placeholder of the i-th text."""
    texts: list[list[str | int]]
    """The parts of each text: a string of the template, or the index of a message."""
    answers: list[_Answer]
    places: list[tuple[int, int] | None]
    """Range of each answer in the skeleton."""


class Renderer:
    """Renders conversations with one tokenizer, which is not changed.

    Args:
        tokenizer: tokenizer in fine-tuning mode.
        supervise: see `RenderingSettings`.
        max_tokens: longer conversations cannot be rendered; None is no limit.
    """

    def __init__(
        self,
        tokenizer: MistralTokenizer,
        *,
        supervise: Literal["all_turns", "last_turn"] = "all_turns",
        max_tokens: int | None = None,
    ) -> None:
        # mistral-common, here and below: 0.7 s that programs' --help must not wait for.
        from mistral_common.protocol.instruct import normalize

        self._library_encode = tokenizer.instruct_tokenizer.tokenizer.encode
        self._max_tokens = max_tokens
        self._supervises_last_turn = supervise == "last_turn"
        # Copies, so that the caller's tokenizer never returns placeholders.
        self._tokenizer = copy.copy(tokenizer)
        # Any: methods are replaced below, and the base class does not declare one of them.
        self._instruct: Any = copy.copy(tokenizer.instruct_tokenizer)
        self._instruct.tokenizer = copy.copy(tokenizer.instruct_tokenizer.tokenizer)
        self._tokenizer.instruct_tokenizer = self._instruct
        self.bos_id: int = self._instruct.tokenizer.bos_id
        self.eos_id: int = self._instruct.tokenizer.eos_id
        # Normalizers up to v13 are known: v7 and later keep the system message among the messages,
        # earlier ones pass it separately.
        self._normalizer = tokenizer._instruct_request_normalizer
        self._knows_normalizer = type(self._normalizer) in (
            normalize.InstructRequestNormalizer,
            normalize.InstructRequestNormalizerV7,
            normalize.InstructRequestNormalizerV13,
        )
        self._texts: list[str] = []
        self._answers: list[_Answer] = []
        self._shapes: dict[tuple[str, ...], _Written] = {}
        """Skeletons of plain chats, by their roles."""
        self._control = functools.cache(lambda token: array("i", [token]))
        self._listen()

    def render(self, messages: Sequence[Message], tools: str | None = None) -> Rendering:
        """Render one conversation.

        Args:
            tools: JSON list in OpenAI's format.
        Raises:
            CannotRender: the library refuses it, or it has no supervised token.
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
        starts = [0, *itertools.accumulate(len(piece) for piece in pieces)]
        is_learned = self._choose(messages, written.answers)
        spans = [
            (starts[place[0]], starts[place[1]])
            for place, learned in zip(written.places, is_learned, strict=True)
            if place is not None and learned
        ]
        if not spans:
            raise CannotRender("no supervised token", f"{len(is_learned)} answers, none learned")
        return self._rendering(pieces, spans)

    def _encode_text(self, text: str) -> array[int]:
        return array("i", self._library_encode(text, bos=False, eos=False))

    def _render_text(self, text: str) -> Rendering:
        """Render a plain text: every token except BOS is supervised."""
        encoded = self._encode_text(text)
        if not encoded:
            raise CannotRender("no supervised token", "an empty text")
        pieces = [self._control(self.bos_id), encoded, self._control(self.eos_id)]
        return self._rendering(pieces, [(1, len(encoded) + 2)])

    def _rendering(self, pieces: Sequence[array[int]], spans: list[tuple[int, int]]) -> Rendering:
        token_ids = np.frombuffer(b"".join(pieces), dtype=np.int32)
        if self._max_tokens is not None and len(token_ids) > self._max_tokens:
            raise CannotRender(
                "too many tokens", f"{len(token_ids)} tokens, at most {self._max_tokens} wanted"
            )
        return Rendering(token_ids, spans)

    def _listen(self) -> None:
        """Make our copy of the library's tokenizer write skeletons and record the answers."""
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
        # The library decodes its result for a property that is not used here.
        self._instruct.decode = lambda *_, **__: ""

    def _written(self, messages: Sequence[Message], tools: str | None) -> _Written:
        """Return a conversation as the library writes it; plain chats come from the cache."""
        if not (self._knows_normalizer and is_plain(messages, tools)):
            return self._ask(self._validated_skeleton, messages, tools)
        # With an empty system prompt or a space at the end of an answer, some versions write
        # another skeleton, so the roles alone do not decide.
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
        """Encode a plain chat as `encode_chat_completion` does, without its checks and copies."""
        from mistral_common.protocol.instruct import messages as kinds
        from mistral_common.protocol.instruct.request import InstructRequest, ModelSettings

        # Any: type checkers do not see the classmethods of these models.
        of_role: dict[str, Any] = {
            "system": kinds.SystemMessage,
            "user": kinds.UserMessage,
            "assistant": kinds.AssistantMessage,
        }
        system_prompt = None
        if messages[0]["role"] == "system" and not self._normalizer._system_prompt_in_begin:
            system_prompt = messages[0]["content"]
            messages = messages[1:]
        request: Any = InstructRequest.model_construct(
            messages=[
                of_role[message["role"]].model_construct(content=message["content"])
                for message in messages
            ],
            system_prompt=system_prompt,
            settings=ModelSettings.none(),
        )
        return self._instruct.encode_instruct(request).tokens

    def _validated_skeleton(self, messages: Sequence[Message], tools: str | None) -> list[int]:
        from mistral_common.exceptions import MistralCommonException

        try:
            return self._tokenizer.encode_chat_completion(chat_request(messages, tools)).tokens
        except (MistralCommonException, ValueError) as error:  # pydantic's errors are ValueErrors
            raise CannotRender(
                f"mistral-common refuses it ({type(error).__name__})",
                next(iter(str(error).splitlines()), ""),
            ) from error

    def _choose(self, messages: Sequence[Message], answers: Sequence[_Answer]) -> list[bool]:
        """Return True for each recorded answer that is supervised.

        The library joins consecutive answers, so their weights are compared.
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
    """Convert a conversation of `clean_schema` to the library's request.

    Raises:
        ValueError: the request is not valid (pydantic's errors are ValueErrors).
        MistralCommonException: the library does not know a message.
    """
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    return ChatCompletionRequest.from_openai(
        messages=[openai_message(message) for message in messages],
        tools=json.loads(tools) if tools else None,
    )


def openai_message(message: Message) -> dict[str, Any]:  # untyped: what the libraries take
    """Return a message without its null fields and without our own `weight`."""
    kept = _without_nulls(message)
    kept.pop("weight", None)
    if "tool_calls" in kept:
        kept["tool_calls"] = [_without_nulls(call) for call in kept["tool_calls"]]
    return kept


def is_plain(messages: Sequence[Message], tools: str | None) -> bool:
    """True if a conversation is an optional system prompt and then alternating questions and
    answers, all of them texts. The library's normalizer leaves these unchanged."""
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
    """Find the answers in the skeleton of a conversation.

    Every answer ends in EOS, and no other EOS occurs: texts are placeholders here, and a text never
    becomes a control token. So the n-th EOS closes the n-th answer.

    Args:
        answers: each answer with its EOS, in order; an answer that was left out is empty.
        skeleton: skeleton of the whole conversation.
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
    """Split a text that the library would encode into strings and indices of messages."""
    parts = MARKED.split(text)  # mark numbers are at odd places
    return [int(part) if at % 2 else part for at, part in enumerate(parts) if part]


def _without_nulls(row: Message | ToolCall) -> dict[str, Any]:  # untyped: for `openai_message`
    return {key: value for key, value in row.items() if value is not None}
