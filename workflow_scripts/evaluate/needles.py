"""Needles: a fact put into held-out text at a chosen depth, with a question about it at the end.

A prompt is one user message in the chat template: text, the statement in a separate paragraph, more
text, and the question; then the beginning of the answer, up to the code. Prompts with the same
number share text, city and code over all lengths and depths, so two cells differ only in the amount
of text and the place of the statement.

Source: the task is G. Kamradt's "needle in a haystack" (2023), with a code that cannot be guessed.
"""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from workflow_scripts.chats.messages import Message
from workflow_scripts.demo import recall
from workflow_scripts.evaluate.questions import TASKS, Question
from workflow_scripts.log import StageError
from workflow_scripts.tokens.rendering import Renderer

PARAGRAPH_END = re.compile(r"\n\s*\n")
MAX_CHARACTERS_PER_TOKEN = 8  # in running text; measured: 3 to 5
WORD_END = re.compile(r"(?<=\S)(?=\s|$)")


@dataclass(frozen=True)
class Needle:
    """A prompt with its right answer."""

    question: Question
    input_ids: np.ndarray
    """(n_tokens,) int32: prompt, beginning of the answer, code."""
    answer: tuple[int, int]
    """Half-open range of the code, at the end."""


def haystack(messages: Iterable[Message]) -> list[str]:
    """Return the paragraphs that users wrote or pasted, in order, without duplicates.

    A paragraph about a city's code would be a second needle, and one that ends in a question mark a
    second question: both are left out.
    """
    paragraphs = (
        paragraph.strip()
        for message in messages
        if message["role"] in ("user", "text") and message["content"]
        for paragraph in PARAGRAPH_END.split(message["content"])
    )
    return [
        paragraph
        for paragraph in dict.fromkeys(paragraphs)
        if paragraph and not paragraph.endswith("?") and not recall.is_about_a_code(paragraph)
    ]


class NeedlePrompts:
    """Makes the prompts for a model.

    Args:
        paragraphs: text from `haystack`.
        renderer: renders with the model's tokenizer.
        seed: decides which texts and facts are drawn.
    """

    def __init__(self, paragraphs: Sequence[str], renderer: Renderer, *, seed: int) -> None:
        self._paragraphs = paragraphs
        self._renderer = renderer
        self._seed = seed
        self._n_characters = sum(map(len, paragraphs))

    def make(
        self, number: int, *, length_tokens: int, depth_fraction: float, task: str = "single"
    ) -> Needle:
        """Return the longest prompt that, with its answer, has at most `length_tokens` tokens.

        Args:
            number: decides text and fact.
            length_tokens: limit for prompt and answer, by the model's tokenizer.
            depth_fraction: lines of text before the statement ÷ all lines of text.
            task: key of `questions.TASKS`.
        Raises:
            StageError: there is too little text for the length, or question and answer alone are
                longer.
        """
        generator = random.Random(f"{self._seed} {number}")
        question = TASKS[task](generator, depth_fraction)
        text = self._text(generator, MAX_CHARACTERS_PER_TOKEN * length_tokens)
        ends = [0, *(match.start() for match in WORD_END.finditer(text))]

        def length(n_words: int) -> int:
            asked = self._asked(text[: ends[n_words]], question)
            return len(self._answered(asked, question, question.answer))

        # One more word adds a token, or none if two words join; the length hardly ever falls, so
        # bisection finds the edge.
        n_words = bisect.bisect_right(range(len(ends)), length_tokens, key=length) - 1
        if n_words < 0:
            raise StageError(
                "a prompt has no room for its question",
                where="lengths_tokens of evaluation.recall or evaluation.context",
                found=length_tokens,
                expected=f"at least {length(0)}",
            )
        if n_words == len(ends) - 1:
            raise StageError(
                "the held-out text is too short for a prompt",
                where="user messages of the validation split, or evaluation.context.files",
                found=f"{self._n_characters} characters",
                expected=f"enough for {length_tokens} tokens",
                to_fix="raise datasets.<name>.cleaning.validation_fraction, name more files, or"
                " lower the lengths_tokens of evaluation.recall or evaluation.context",
            )
        return self._needle(self._asked(text[: ends[n_words]], question), question)

    def _text(self, generator: random.Random, n_characters: int) -> str:
        """Return paragraphs in their order from a random one on; the first follows the last."""
        first = generator.randrange(len(self._paragraphs)) if self._paragraphs else 0
        chosen: list[str] = []
        for paragraph in [*self._paragraphs[first:], *self._paragraphs[:first]]:
            if n_characters <= 0:
                break
            chosen.append(paragraph)
            n_characters -= len(paragraph)
        return "\n\n".join(chosen)

    def _asked(self, text: str, question: Question) -> Message:
        """Return the user's message: the text with the statements in it, and the question."""
        lines = text.split("\n")
        places = [round(depth * len(lines)) for depth, _ in question.statements]
        # Insert from the last place on, so that no insertion moves a place still to come; of two
        # statements at one place the first stays in front.
        order = sorted(range(len(places)), key=lambda at: (places[at], at), reverse=True)
        for at in order:
            lines.insert(places[at], f"\n{question.statements[at][1]}\n")
        return {"role": "user", "content": "\n".join([*lines, "", question.text]).strip()}

    def _needle(self, asked: Message, question: Question) -> Needle:
        begun, ids = (self._answered(asked, question, answer) for answer in ("", question.answer))
        # A user's own vocabulary may have a token that spans the end of `begun`.
        differs = np.flatnonzero(begun != ids[: len(begun)])
        start = int(differs[0]) if len(differs) else len(begun)
        return Needle(question, ids, (start, len(ids)))

    def _answered(self, asked: Message, question: Question, answer: str) -> np.ndarray:
        """Return the token ids of question and answer, without the EOS at the end."""
        answered = f"{question.answer_start} {answer}".rstrip()
        messages: list[Message] = [asked, {"role": "assistant", "content": answered}]
        return self._renderer.render(messages).input_ids[:-1]


def default_lengths(window: int | None, context_tokens: int) -> list[int]:
    """Return a quarter, a half, one, two and four windows; without a window, the same shares of the
    context (1/16 to all of it). Lengths beyond the context are left out."""
    longest = context_tokens if window is None else 4 * window
    lengths = [longest * part // 16 for part in (1, 2, 4, 8, 16)]
    return [length for length in lengths if length <= context_tokens]
