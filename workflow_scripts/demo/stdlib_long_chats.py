"""Long conversations about the standard library: the user pastes help texts turn by turn, states
facts among them, and asks about everything said before.

They have about 250 to 3,800 tokens. Every answer is short, and is in the conversation itself, a few
tokens or several windows back, so that they measure how a model reads, not what it knows.

The texts are divided into shelves. A conversation pastes from one shelf, its `group`, so that a
split by group keeps every text in one split.
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
# About 3.2 characters per token, with questions and answers (measured).
MIN_CHARACTERS, MAX_CHARACTERS = 900, 11_000
MAX_TEXTS_A_TURN = 3
FACT_FRACTION = 0.5  # share of the pasting turns that state a fact
RECALL_FRACTION = 0.3  # share of the questions that ask for a fact, while one is left
SECOND_QUESTION_FRACTION = 0.5  # share of the pasting turns that a second question follows


def make_long_chats(*, n_conversations: int, seed: int) -> list[DemoChat]:
    """Return chats with long texts, pasted over several turns.

    Args:
        n_conversations: number of chats.
        seed: decides all random choices.
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
    """Return a help text as the user pastes it."""
    return f"{entry.call or entry.name}\n\n{entry.docstring}"


def _turns(shelf: Sequence[Entry], generator: random.Random) -> Iterator[Turn]:
    """Yield one conversation; its last turn exceeds a length that is drawn log-uniformly."""
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
    """Return a question about anything read so far, or about a fact.

    Each fact is asked for once, because a second answer would be closer than the statement.
    """
    if unasked and generator.random() < RECALL_FRACTION:
        fact = unasked.pop(generator.randrange(len(unasked)))
        return Turn(fact.question, fact.code, is_fact=True)
    entry = generator.choice(read)
    turns = stdlib_questions.other_turns(entry, None, generator)
    if entry.call is not None:
        turns.append(stdlib_questions.signature_turn(entry, generator))
    return generator.choice(turns)
