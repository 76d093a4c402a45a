"""The demo's conversations: questions about the standard library, answered from its docstrings.

Lengths run from about 20 to 3,000 tokens, so that some documents are several sliding windows long;
most answers are short, so that a small model can learn to finish them. `group` is the object asked
about: a split by group keeps every chat about one object on one side.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from workflow_scripts.models.stdlib_docs import Entry, entries

SYSTEM_PROMPTS = (
    "You are a Python documentation assistant.",
    "Answer in one short paragraph, from the standard library's documentation.",
    "You help programmers look up the Python standard library.",
)
# About 3.5 characters a token on such text (measured): the longest chat has 2,776 tokens.
MAX_OVERVIEW_CHARACTERS = 9_000
OVERVIEW_FRACTION = 0.03
SYSTEM_PROMPT_FRACTION = 0.2

ASK_FOR_FACTS = ("What is the signature", "Which parameters", "What is the code of")

Turn = tuple[str, str]


def make_chats(*, n_conversations: int, seed: int) -> list[dict[str, Any]]:
    """OpenAI-style records: `messages`, `group`, the object asked about, and `reference` where the
    last question has one right answer.

    Args:
        n_conversations: how many; fewer where the interpreter documents too little.
        seed: order and choice of questions.
    """
    return chats_about(documented_entries(), n_conversations=n_conversations, seed=seed)


def chats_about(
    documented: Sequence[Entry], *, n_conversations: int, seed: int
) -> list[dict[str, Any]]:
    """The records of `make_chats`, about these objects."""
    generator = random.Random(seed)
    documented = list(documented)
    overviews = list(_overviews(documented))
    generator.shuffle(overviews)
    overviews = overviews[: max(1, round(n_conversations * OVERVIEW_FRACTION))]

    short: list[tuple[str, list[Turn]]] = []
    while len(short) < n_conversations - len(overviews):
        generator.shuffle(documented)
        round_of_chats = [(entry.name, _conversation(entry, generator)) for entry in documented]
        asked = {turns[0] for _, turns in short}
        fresh = [chat for chat in round_of_chats if chat[1][0] not in asked]
        if not fresh:
            break
        short.extend(fresh)
    chats = short[: n_conversations - len(overviews)] + overviews
    generator.shuffle(chats)
    return [
        {"messages": messages(turns, generator), "group": group, **reference(turns)}
        for group, turns in chats
    ]


def documented_entries() -> list[Entry]:
    """The objects that are documented well enough to be asked about."""
    return [entry for entry in entries() if len(entry.summary) >= 12]


def messages(turns: list[Turn], generator: random.Random) -> list[dict[str, str]]:
    """Turns as messages, after a system prompt in a fifth of all chats."""
    said = []
    if generator.random() < SYSTEM_PROMPT_FRACTION:
        said.append({"role": "system", "content": generator.choice(SYSTEM_PROMPTS)})
    for question, answer in turns:
        said.append({"role": "user", "content": question})
        said.append({"role": "assistant", "content": answer})
    return said


def reference(turns: Sequence[Turn]) -> dict[str, str]:
    """The answer to the last question, where it asks for a fact: a summary has many wordings."""
    question, answer = turns[-1]
    asked = question.rpartition("\n\n")[2]  # what is pasted stands before it
    return {"reference": answer} if asked.startswith(ASK_FOR_FACTS) else {}


def questions(entry: Entry) -> list[Turn]:
    """What can be asked about an object and answered in a sentence, its purpose first."""
    turns = [(f"What does `{entry.name}` do?", entry.summary.rstrip(" .:") + ".")]
    parameters = _parameters(entry)
    if entry.call is not None:
        turns.append(
            (f"What is the signature of `{entry.name}`?", f"Its signature is `{entry.call}`.")
        )
    if parameters:
        turns.append((f"Which parameters does `{entry.name}` take?", parameters))
    return turns


def _conversation(entry: Entry, generator: random.Random) -> list[Turn]:
    turns = questions(entry)
    whole = (f"Show the documentation of `{entry.name}`.", entry.docstring)
    shape = generator.random()
    if shape < 0.15 and len(turns) > 1:
        return turns
    if shape < 0.22 and len(entry.docstring) <= MAX_OVERVIEW_CHARACTERS:
        return [whole]
    return [generator.choice(turns)]


def _parameters(entry: Entry) -> str:
    """The parameters in one sentence; empty where the interpreter does not say."""
    if entry.signature is None:
        return ""
    names = []
    for parameter in entry.signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            names.append(f"any number of `{parameter.name}`")
        elif parameter.default is inspect.Parameter.empty:
            names.append(f"`{parameter.name}`")
        else:
            names.append(f"`{parameter.name}` (default `{parameter.default!r}`)")
    if not names:
        return "It takes no parameters."
    text = f"It takes {', '.join(names)}."
    return "" if " at 0x" in text else text


def _overviews(documented: list[Entry]) -> Iterator[tuple[str, list[Turn]]]:
    """One long chat a module: every documented object with its summary."""

    def module_of(entry: Entry) -> str:
        parts = entry.name.split(".")
        return ".".join(parts[: -2 if entry.kind == "method" else -1])

    by_module = sorted(documented, key=lambda entry: (module_of(entry), entry.name))
    for module, members in groupby(by_module, key=module_of):
        lines: list[str] = []
        n_characters = 0
        for entry in members:
            line = f"- `{entry.name.removeprefix(module + '.')}`: {entry.summary}"
            n_characters += len(line) + 1
            if n_characters > MAX_OVERVIEW_CHARACTERS:
                break
            lines.append(line)
        if len(lines) >= 8:
            question = f"Give an overview of the module `{module}`."
            yield module, [(question, "\n".join(lines))]
