"""Questions that only a reader of the long text can answer, after RULER (arXiv:2404.06654).

- `single`: one fact somewhere in the text (RULER's NIAH single).
- `multi_key`: one fact among facts about other keys (RULER's NIAH multi-key).
- `variable_tracing`: a chain of variables, each set to the one before; the question is the value
  of the last.

Answers are four-digit numbers that cannot be guessed or derived from anything else.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from workflow_scripts.demo import recall

N_DISTRACTORS = 3  # RULER's default
N_HOPS = 4  # RULER's default


@dataclass(frozen=True)
class Question:
    """Statements to insert into a text, a question about them, and the right answer.

    The model's turn begins with `answer_start`, like RULER's answer prefixes, so that a model that
    was never tuned on chats can answer too.
    """

    statements: tuple[tuple[float, str], ...]
    """Place of each statement (0 is the beginning of the text, 1 its end), and its text."""
    text: str
    answer_start: str
    """`The code of Oslo is`"""
    answer: str


def single(generator: random.Random, depth_fraction: float) -> Question:
    """The code of a city, stated at a depth."""
    (fact,) = recall.draw_facts(generator, 1)
    return _about(fact, ((depth_fraction, fact.statement),))


def multi_key(generator: random.Random, depth_fraction: float) -> Question:
    """The code of a city, with the codes of other cities at random depths."""
    fact, *others = recall.draw_facts(generator, 1 + N_DISTRACTORS)
    distractors = tuple((generator.random(), other.statement) for other in others)
    return _about(fact, ((depth_fraction, fact.statement), *distractors))


def _about(fact: recall.Fact, statements: tuple[tuple[float, str], ...]) -> Question:
    return Question(statements, fact.question, fact.answer_start, fact.code)


def variable_tracing(generator: random.Random, depth_fraction: float) -> Question:
    """A chain of variables spread evenly over the text; the depth is ignored."""
    names: list[str] = []
    while len(names) <= N_HOPS:
        name = "".join(generator.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    (fact,) = recall.draw_facts(generator, 1)
    said = [f"The variable {names[0]} is {fact.code}."]
    said += [
        f"The variable {name} is the same as the variable {before}."
        for before, name in zip(names, names[1:], strict=False)
    ]
    statements = tuple(
        ((number + 0.5) / len(said), statement) for number, statement in enumerate(said)
    )
    text = f"What number is the variable {names[-1]}?"
    # No statement begins like this, so a model that copies a statement gives no wrong answer.
    answer_start = f"The number of the variable {names[-1]} is"
    return Question(statements, text, answer_start, fact.code)


TASKS: dict[str, Callable[[random.Random, float], Question]] = {
    "single": single,
    "multi_key": multi_key,
    "variable_tracing": variable_tracing,
}
WITHOUT_DEPTH = frozenset({"variable_tracing"})
