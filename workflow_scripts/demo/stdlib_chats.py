"""The demo's conversations: the user pastes source code or help texts of the standard library and
asks about them; the answers follow from what was pasted.

Chats are built shelf by shelf, five to a shelf: a long one of many turns, and four short ones. A
shelf holds whole classes and whole modules' functions, and every object is pasted in one chat only.
`group` is the shelf: a split by group therefore keeps objects of the test split out of training,
and its sizes do not depend on the interpreter, whose texts differ between versions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import NotRequired, TypedDict

from workflow_scripts.chats.messages import Message
from workflow_scripts.demo import stdlib_questions
from workflow_scripts.demo.stdlib_docs import Entry, entries
from workflow_scripts.demo.stdlib_questions import Subject, Turn

SYSTEM_PROMPTS = (
    "You are a Python documentation assistant.",
    "Answer in one short sentence, from the text that the user pastes.",
    "You help programmers read the source of the Python standard library.",
)
SYSTEM_PROMPT_FRACTION = 0.3
CHATS_PER_SHELF = 5
# Tokens as `count_tokens` counts them.
MIN_TEXT_TOKENS, MAX_TEXT_TOKENS = 25, 200
# The long chat of a shelf: beyond the window of the demo's model, 512 tokens, and no longer than a
# row of its training, 1,024. The texts end between these two; the last questions go beyond.
MIN_LONG_TOKENS, MAX_LONG_TOKENS = 580, 680
N_LISTED, N_ASKED_OF_LISTED = 4, 3
TOKEN = re.compile(r"[A-Z]?[a-z]{1,6}|[A-Z]{1,3}|\d|[^\w\s]|_|\n")
N_CONTROL_TOKENS = 3  # of a turn: [INST], [/INST] and EOS


class DemoChat(TypedDict):
    """One record of the demo's dataset."""

    messages: list[Message]
    group: str
    """The shelf that its texts are from."""
    reference: NotRequired[str]
    """The answer to the last question, where it has one right wording."""


def make_chats(*, n_conversations: int, seed: int) -> list[DemoChat]:
    """Chats about objects of the standard library.

    Args:
        n_conversations: how many; fewer where the interpreter documents too little.
        seed: choice and order of objects and questions.
    """
    return chats_about(subjects(entries()), n_conversations=n_conversations, seed=seed)


def subjects(documented: Sequence[Entry]) -> list[Subject]:
    """The objects that can be asked about."""
    found = [one for entry in documented if (one := stdlib_questions.subject_of(entry))]
    return [one for one in found if MIN_TEXT_TOKENS <= count_tokens(one.text) <= MAX_TEXT_TOKENS]


def chats_about(found: Sequence[Subject], *, n_conversations: int, seed: int) -> list[DemoChat]:
    """The records of `make_chats`, about these objects."""
    generator = random.Random(seed)
    chats = [
        chat_of(turns, group, generator)
        for group, turns in islice(_all_turns(found, generator), n_conversations)
    ]
    generator.shuffle(chats)
    return chats


def chat_of(turns: Sequence[Turn], group: str, generator: random.Random) -> DemoChat:
    """Turns as a record, after a system prompt in a part of all chats."""
    said: list[Message] = []
    if generator.random() < SYSTEM_PROMPT_FRACTION:
        said.append({"role": "system", "content": generator.choice(SYSTEM_PROMPTS)})
    for turn in turns:
        said.append({"role": "user", "content": turn.question})
        said.append({"role": "assistant", "content": turn.answer})
    chat: DemoChat = {"messages": said, "group": group}
    if turns[-1].is_fact:
        chat["reference"] = turns[-1].answer
    return chat


def _all_turns(
    found: Sequence[Subject], generator: random.Random
) -> Iterator[tuple[str, list[Turn]]]:
    """Chats with their shelf, until there is too little left for another one."""
    by_owner = sorted(found, key=lambda one: (one.owner, one.entry.name))
    owners = [list(members) for _, members in groupby(by_owner, key=lambda one: one.owner)]
    generator.shuffle(owners)
    number = 0
    while True:
        unused: list[Subject] = []
        # The first question asks for a signature, but in the last chat of every other shelf.
        last = _short_chat if number % 2 else _other_short_chat
        kinds = (_long_chat, _short_chat, _listing_chat, _follow_up_chat, last)
        for kind in kinds:
            while (turns := kind(unused, generator)) is None:
                if not owners:
                    return
                unused = [*owners.pop(), *unused]
            yield f"shelf {number}", turns
        number += 1


Chat = Callable[[list[Subject], random.Random], list[Turn] | None]
"""Takes the objects it pastes from those that are unused; None where they are too few."""


def _long_chat(unused: list[Subject], generator: random.Random) -> list[Turn] | None:
    """Text after text, each with all questions."""
    if sum(map(_text_tokens, unused)) < MAX_LONG_TOKENS:
        return None
    turns: list[Turn] = []
    while (n_tokens := sum(map(_turn_tokens, turns))) < MIN_LONG_TOKENS:
        fits = (one for one in unused if _text_tokens(one) <= MAX_LONG_TOKENS - n_tokens)
        one = next(fits, None) or min(unused, key=_text_tokens)
        unused.remove(one)
        signature, *others = _shuffled_turns(one, generator)
        is_signature_first = not turns or generator.random() < 0.5
        asked = [signature, *others] if is_signature_first else [*others, signature]
        turns.append(_pasted(one.text, asked[0]))
        turns.extend(asked[1:])
    return turns


def _short_chat(unused: list[Subject], generator: random.Random) -> list[Turn] | None:
    """One text, the question for its signature, and two others."""
    if not unused:
        return None
    one = unused.pop(0)
    signature, *others = _shuffled_turns(one, generator)
    return [_pasted(one.text, signature), *others[:2]]


def _other_short_chat(unused: list[Subject], generator: random.Random) -> list[Turn] | None:
    """One text, and all questions but the one for its signature."""
    if not unused:
        return None
    one = unused.pop(0)
    _, first, *others = _shuffled_turns(one, generator)
    return [_pasted(one.text, first), *others]


def _follow_up_chat(unused: list[Subject], generator: random.Random) -> list[Turn] | None:
    """One text, the question for its signature, and all others."""
    if not unused:
        return None
    one = unused.pop(0)
    signature, *others = _shuffled_turns(one, generator)
    return [_pasted(one.text, signature), *others]


def _listing_chat(unused: list[Subject], generator: random.Random) -> list[Turn] | None:
    """Several objects in a list, and the signatures of three of them."""
    if len(unused) < N_LISTED:
        return None
    listed = [unused.pop(0).entry for _ in range(N_LISTED)]
    first, *others = (
        stdlib_questions.signature_turn(one, generator)
        for one in generator.sample(listed, N_ASKED_OF_LISTED)
    )
    return [_pasted(stdlib_questions.listing(listed), first), *others]


def _shuffled_turns(one: Subject, generator: random.Random) -> list[Turn]:
    """The question for the signature, then the others in a random order."""
    others = stdlib_questions.other_turns(one.entry, one.raised, generator)
    generator.shuffle(others)
    return [stdlib_questions.signature_turn(one.entry, generator), *others]


def count_tokens(text: str) -> int:
    """The tokens of a text by Mistral's v3 tokenizer, within a sixth on a long chat (measured);
    the tokenizer itself is not needed to make chats."""
    return sum(1 for _ in TOKEN.finditer(text))


def _text_tokens(one: Subject) -> int:
    return count_tokens(one.text)


def _turn_tokens(turn: Turn) -> int:
    return count_tokens(turn.question) + count_tokens(turn.answer) + N_CONTROL_TOKENS


def _pasted(text: str, turn: Turn) -> Turn:
    """The turn, its question behind the text: behind a question a small model goes on with the
    text instead of answering."""
    return turn._replace(question=f"{text}\n\n{turn.question}")
