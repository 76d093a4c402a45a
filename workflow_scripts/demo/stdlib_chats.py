"""The demo's conversations: the user pastes source code or help texts of the standard library and
asks about them. The answers follow from the pasted text.

Chats are made shelf by shelf, five per shelf: one long chat of many turns, and four short ones. A
shelf holds whole classes and all functions of whole modules, and an object is pasted in one chat
only. The shelf is the chat's `group`. So a split by group keeps objects of the test split out of
training, and its sizes do not depend on the interpreter, whose texts differ between versions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, groupby, islice
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
# In the tokens of `count_tokens`.
MIN_TEXT_TOKENS, MAX_TEXT_TOKENS = 25, 200
# The long chat of a shelf exceeds the window of the demo's model, 512 tokens, and fits in a row of
# its training, 1,024. Its texts end between these two limits; the last questions exceed them.
MIN_LONG_TOKENS, MAX_LONG_TOKENS = 580, 680
N_LISTED, N_ASKED_OF_LISTED = 4, 3
TOKEN = re.compile(r"[A-Z]?[a-z]{1,6}|[A-Z]{1,3}|\d|[^\w\s]|_|\n")
N_CONTROL_TOKENS = 3  # per turn: [INST], [/INST] and EOS


class DemoChat(TypedDict):
    """One record of the demo's dataset."""

    messages: list[Message]
    group: str
    """The shelf of its texts."""
    reference: NotRequired[str]
    """The answer to the last question, if it has one right wording."""


def make_chats(*, n_conversations: int, seed: int) -> list[DemoChat]:
    """Return chats about objects of the standard library.

    Args:
        n_conversations: number of chats; fewer if the interpreter documents too little.
        seed: decides the choice and order of objects and questions.
    """
    generator = random.Random(seed)
    chats = [
        chat_of(turns, group, generator)
        for group, turns in islice(_all_turns(subjects(entries()), generator), n_conversations)
    ]
    generator.shuffle(chats)
    return chats


def subjects(documented: Sequence[Entry]) -> list[Subject]:
    """Return the objects that can be asked about."""
    found = [one for entry in documented if (one := stdlib_questions.subject_of(entry))]
    return [one for one in found if MIN_TEXT_TOKENS <= count_tokens(one.text) <= MAX_TEXT_TOKENS]


def chat_of(turns: Sequence[Turn], group: str, generator: random.Random) -> DemoChat:
    """Return turns as a record; a share of the chats begins with a system prompt."""
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
    """Yield chats with their shelf, until too little is left for another chat."""
    by_owner = sorted(found, key=lambda one: (one.owner, one.entry.name))
    owners = [list(members) for _, members in groupby(by_owner, key=lambda one: one.owner)]
    generator.shuffle(owners)
    short_chat = partial(_text_chat, asked=slice(3))
    whole_chat = partial(_text_chat, asked=slice(None))
    for number in count():
        unused: list[Subject] = []
        # In the last chat of every other shelf, no question asks for the signature.
        last = short_chat if number % 2 else partial(_text_chat, asked=slice(1, None))
        kinds: tuple[Chat, ...] = (_long_chat, short_chat, _listing_chat, whole_chat, last)
        for kind in kinds:
            while (turns := kind(unused, generator)) is None:
                if not owners:
                    return
                unused = [*owners.pop(), *unused]
            yield f"shelf {number}", turns


Chat = Callable[[list[Subject], random.Random], list[Turn] | None]
"""Takes the objects to paste from the unused ones; returns None if they are too few."""


def _long_chat(unused: list[Subject], generator: random.Random) -> list[Turn] | None:
    """Return several texts, each with all questions."""
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


def _text_chat(
    unused: list[Subject], generator: random.Random, *, asked: slice
) -> list[Turn] | None:
    """Return one text and some of its questions, of which the first is for the signature."""
    if not unused:
        return None
    one = unused.pop(0)
    first, *others = _shuffled_turns(one, generator)[asked]
    return [_pasted(one.text, first), *others]


def _listing_chat(unused: list[Subject], generator: random.Random) -> list[Turn] | None:
    """Return a list of several objects, and questions for the signatures of three of them."""
    if len(unused) < N_LISTED:
        return None
    listed = [unused.pop(0).entry for _ in range(N_LISTED)]
    first, *others = (
        stdlib_questions.signature_turn(one, generator)
        for one in generator.sample(listed, N_ASKED_OF_LISTED)
    )
    return [_pasted(stdlib_questions.listing(listed), first), *others]


def _shuffled_turns(one: Subject, generator: random.Random) -> list[Turn]:
    """Return the question for the signature, then the others in random order."""
    others = stdlib_questions.other_turns(one.entry, one.raised, generator)
    generator.shuffle(others)
    return [stdlib_questions.signature_turn(one.entry, generator), *others]


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text, without the tokenizer.

    On a long chat the number is within a sixth of that of Mistral's v3 tokenizer (measured).
    """
    return sum(1 for _ in TOKEN.finditer(text))


def _text_tokens(one: Subject) -> int:
    return count_tokens(one.text)


def _turn_tokens(turn: Turn) -> int:
    return count_tokens(turn.question) + count_tokens(turn.answer) + N_CONTROL_TOKENS


def _pasted(text: str, turn: Turn) -> Turn:
    """Put the text before the question of a turn.

    After a text, a small model would continue the text instead of answering.
    """
    return turn._replace(question=f"{text}\n\n{turn.question}")
