"""A chat with one loaded model that never outgrows its context."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_types import ChatCompletionRequestMessage

from workflow_scripts.chats.messages import Message
from workflow_scripts.log import StageError
from workflow_scripts.serve import loaded_models
from workflow_scripts.serve.prompts import Prompts

# Share of the context that stays free for the answer when old turns are forgotten.
ANSWER_FRACTION = 0.25


@dataclass
class Conversation:
    """A chat with one model."""

    llama: Llama
    prompts: Prompts
    system: str | None
    max_tokens: int | None
    sampling: dict[str, Any]
    turns: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a message, piece by piece. Both join the history.

        Raises:
            StageError: the message alone does not fit into the context.
        """
        self.turns.append({"role": "user", "content": text})
        self._forget()
        messages = cast("list[ChatCompletionRequestMessage]", self._messages())
        chunks = self.llama.create_chat_completion(
            messages, stream=True, max_tokens=self.max_tokens, **self.sampling
        )
        assert isinstance(chunks, Iterator)  # because of `stream`
        written = ""
        try:
            for chunk in chunks:
                piece = str(chunk["choices"][0]["delta"].get("content") or "")
                written += piece
                if piece:
                    yield piece
        finally:  # an interrupted answer stays as far as it was written
            if written:
                self.turns.append({"role": "assistant", "content": written})
            else:
                self.turns.pop()  # an empty answer cannot be rendered

    def _messages(self) -> list[Message]:
        system = [Message(role="system", content=self.system)] if self.system else []
        return system + self.turns

    def _forget(self) -> None:
        """Drop the oldest turns until the rest leaves room for an answer."""
        n_ctx = loaded_models.context_of(self.llama)
        n_forgotten = 0
        while len(self.prompts.render(self._messages())) > (1 - ANSWER_FRACTION) * n_ctx:
            if len(self.turns) == 1:
                self.turns.clear()
                raise StageError(
                    "the message does not fit into the context", expected=f"{n_ctx} tokens"
                )
            del self.turns[:2]
            n_forgotten += 1
        if n_forgotten:
            print(f"forgot the oldest turns: {n_forgotten}", file=sys.stderr, flush=True)

    def speed(self) -> str:
        """llama.cpp's own figures for the last answer; resets them for the next."""
        measured = llama_cpp.llama_perf_context(self.llama.ctx)
        llama_cpp.llama_perf_context_reset(self.llama.ctx)
        parts = []
        for what, n, milliseconds in (
            ("prompt", measured.n_p_eval, measured.t_p_eval_ms),
            ("answer", measured.n_eval, measured.t_eval_ms),
        ):
            rate = f", {1000 * n / milliseconds:.1f} tokens/s" if milliseconds > 0 else ""
            parts.append(f"{what} {n} tokens{rate}")
        return "; ".join(parts)
