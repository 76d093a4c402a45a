"""Needles: a fact put into held-out text at a chosen depth, and asked for at the end.

A prompt is one question of a user, in the chat template: text, the statement in a paragraph of its
own, text, the question; and the beginning of the answer, up to the code. Prompts of one number
share text, city and code over all lengths and depths, so that what differs between two cells is how
much text there is and where the statement stands.

Source: the task is G. Kamradt's "needle in a haystack" (2023), with a code that cannot be guessed.
"""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflow_scripts.chats.messages import Message
from workflow_scripts.demo import recall
from workflow_scripts.evaluate.questions import TASKS, Question
from workflow_scripts.log import StageError
from workflow_scripts.tokens.rendering import Renderer

if TYPE_CHECKING:
    import numpy as np

PARAGRAPH_END = re.compile(r"\n\s*\n")
MAX_CHARACTERS_A_TOKEN = 8  # of running text; 3 to 5 were measured
WORD_END = re.compile(r"(?<=\S)(?=\s|$)")


@dataclass(frozen=True)
class Needle:
    """A prompt with the right answer to it."""

    question: Question
    input_ids: np.ndarray
    """(n_tokens,) int32: prompt, beginning of the answer, code."""
    answer: tuple[int, int]
    """Half-open range of the code, at the end."""


def haystack(messages: Iterable[Message]) -> list[str]:
    """Paragraphs of what users wrote or pasted, in order, each once.

    A paragraph that speaks of a city's code would be a second needle, and one that ends in a
    question mark a second question: both are left out.
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
    """Makes the prompts of a model.

    Args:
        paragraphs: of `haystack`.
        renderer: of the model's tokenizer.
        seed: decides texts and facts.
    """

    def __init__(self, paragraphs: Sequence[str], renderer: Renderer, *, seed: int) -> None:
        self._paragraphs = paragraphs
        self._renderer = renderer
        self._seed = seed
        self._n_characters = sum(map(len, paragraphs))

    def make(
        self, number: int, *, length_tokens: int, depth_fraction: float, task: str = "single"
    ) -> Needle:
        """A prompt that is, with its answer, as long as it can be and no longer than asked.

        Args:
            number: which text and fact.
            length_tokens: of prompt and answer, by the model's tokenizer.
            depth_fraction: lines of text before the statement ÷ all lines of text.
            task: of `questions.TASKS`.
        Raises:
            StageError: there is too little text for the length, or question and answer alone are
                longer.
        """
        generator = random.Random(f"{self._seed} {number}")
        question = TASKS[task](generator, depth_fraction)
        text = self._text(generator, MAX_CHARACTERS_A_TOKEN * length_tokens)
        ends = [0, *(match.start() for match in WORD_END.finditer(text))]

        def length(n_words: int) -> int:
            asked = self._asked(text[: ends[n_words]], question)
            return len(self._answered(asked, question, question.answer))

        # A word more is a token more, or none where two words join; so the length hardly ever
        # falls, and a bisection finds the edge.
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
        """Paragraphs in their order from a random one on, the first following the last."""
        first = generator.randrange(len(self._paragraphs)) if self._paragraphs else 0
        chosen: list[str] = []
        for paragraph in [*self._paragraphs[first:], *self._paragraphs[:first]]:
            if n_characters <= 0:
                break
            chosen.append(paragraph)
            n_characters -= len(paragraph)
        return "\n\n".join(chosen)

    def _asked(self, text: str, question: Question) -> Message:
        """The user's message: the text with the statements in it, and the question."""
        lines = text.split("\n")
        places = [round(depth * len(lines)) for depth, _ in question.statements]
        # From the last on, so that what is put in moves no place that is still to come; of two at
        # one place the first stays in front.
        order = sorted(range(len(places)), key=lambda at: (places[at], at), reverse=True)
        for at in order:
            lines.insert(places[at], f"\n{question.statements[at][1]}\n")
        return {"role": "user", "content": "\n".join([*lines, "", question.text]).strip()}

    def _needle(self, asked: Message, question: Question) -> Needle:
        import numpy as np

        begun, ids = (self._answered(asked, question, answer) for answer in ("", question.answer))
        # A vocabulary of one's own may have a token that reaches over the end of the beginning.
        differs = np.flatnonzero(begun != ids[: len(begun)])
        start = int(differs[0]) if len(differs) else len(begun)
        return Needle(question, ids, (start, len(ids)))

    def _answered(self, asked: Message, question: Question, answer: str) -> np.ndarray:
        """Token ids of the question and the answer, without the EOS behind it."""
        answered = f"{question.answer_start} {answer}".rstrip()
        messages: list[Message] = [asked, {"role": "assistant", "content": answered}]
        return self._renderer.render(messages).input_ids[:-1]


def default_lengths(window: int | None, context_tokens: int) -> list[int]:
    """A quarter, a half, one, two and four windows; without a window as many parts of the context.

    Lengths beyond the context are left out.
    """
    longest = context_tokens if window is None else 4 * window
    lengths = [longest * part // 16 for part in (1, 2, 4, 8, 16)]
    return [length for length in lengths if length <= context_tokens]
