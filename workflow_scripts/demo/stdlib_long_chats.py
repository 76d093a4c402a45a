"""Long conversations about the standard library: help texts that the user pastes, turn by turn,
facts stated among them, and questions about all that was said before.

From about 250 to 3,800 tokens. Every answer stands in the conversation itself, a few tokens or
several windows back, and is short, so that what is measured is how a model reads, not what it
knows.

The texts lie on shelves: a conversation pastes from one shelf, which is its `group`, so that a
split by group keeps every text on one side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from workflow_scripts.demo import recall, stdlib_questions
from workflow_scripts.demo.stdlib_chats import DemoChat, chat_of
from workflow_scripts.demo.stdlib_docs import Entry, entries
from workflow_scripts.demo.stdlib_questions import (
    MAX_SUMMARY_CHARACTERS,
    MIN_SUMMARY_CHARACTERS,
    Turn,
)

N_SHELVES = 40  # of about 70 texts, 4,500 tokens
MAX_TEXT_CHARACTERS = 1_500  # a longer help text would be most of a short conversation
# About 3.2 characters a token with questions and answers (measured).
MIN_CHARACTERS, MAX_CHARACTERS = 900, 11_000
MAX_TEXTS_A_TURN = 3
FACT_FRACTION = 0.5  # of the turns that paste
RECALL_FRACTION = 0.3  # of the questions, where a fact is left to ask for
SECOND_QUESTION_FRACTION = 0.5  # of the turns that paste, followed by one that only asks


def make_long_chats(*, n_conversations: int, seed: int) -> list[DemoChat]:
    """Chats with long texts, pasted over several turns.

    Args:
        n_conversations: how many.
        seed: decides everything.
    """
    generator = random.Random(seed)
    texts = [
        entry
        for entry in entries()
        if MIN_SUMMARY_CHARACTERS <= len(entry.summary) <= MAX_SUMMARY_CHARACTERS
        and len(pasted(entry)) <= MAX_TEXT_CHARACTERS
    ]
    generator.shuffle(texts)
    shelves = [texts[first::N_SHELVES] for first in range(N_SHELVES)]
    chats = []
    for number in range(n_conversations):
        shelf = number % N_SHELVES
        turns = list(_turns(shelves[shelf], generator))
        chats.append(chat_of(turns, f"shelf {shelf}", generator))
    generator.shuffle(chats)
    return chats


def pasted(entry: Entry) -> str:
    """A help text as the user pastes it."""
    return f"{entry.call or entry.name}\n\n{entry.docstring}"


def _turns(shelf: Sequence[Entry], generator: random.Random) -> Iterator[Turn]:
    """One conversation, of a length drawn evenly on a logarithmic scale; its last turn goes
    beyond."""
    shortest, longest = math.log(MIN_CHARACTERS), math.log(MAX_CHARACTERS)
    n_wanted = math.exp(generator.uniform(shortest, longest))
    unread = generator.sample(shelf, len(shelf))
    unstated = recall.draw_facts(generator, len(recall.CITIES))
    read: list[Entry] = []
    unasked: list[recall.Fact] = []
    n_characters = 0
    while n_characters < n_wanted and unread:
        paragraphs = []
        for _ in range(min(len(unread), generator.randint(1, MAX_TEXTS_A_TURN))):
            read.append(unread.pop())
            paragraphs.append(pasted(read[-1]))
        if unstated and generator.random() < FACT_FRACTION:
            unasked.append(unstated.pop())
            paragraphs.insert(generator.randint(0, len(paragraphs)), unasked[-1].statement)
        asked = _question(read, unasked, generator)
        turns = [asked._replace(question="\n\n".join([*paragraphs, asked.question]))]
        if generator.random() < SECOND_QUESTION_FRACTION:
            turns.append(_question(read, unasked, generator))
        n_characters += sum(len(turn.question) + len(turn.answer) for turn in turns)
        yield from turns


def _question(read: Sequence[Entry], unasked: list[recall.Fact], generator: random.Random) -> Turn:
    """A question about anything read so far, or about a fact that is then asked for no more: a
    second answer would stand nearer than the statement."""
    if unasked and generator.random() < RECALL_FRACTION:
        fact = unasked.pop(generator.randrange(len(unasked)))
        return Turn(fact.question, fact.code, is_fact=True)
    entry = generator.choice(read)
    turns = stdlib_questions.other_turns(entry, None, generator)
    if entry.call is not None:
        turns.append(stdlib_questions.signature_turn(entry, generator))
    return generator.choice(turns)
