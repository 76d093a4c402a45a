"""Questions about an object of the standard library, each with one right answer.

Every answer is computed from `inspect.signature`, the docstring or the syntax tree of the source,
and follows from the text that the user pastes before the question. Questions have several wordings;
answers have one form, so that a small model can learn to give them and to stop.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from workflow_scripts.demo import signatures, stdlib_docs
from workflow_scripts.demo.stdlib_docs import Entry

MAX_SUMMARY_CHARACTERS = 200
MIN_SUMMARY_CHARACTERS = 12
# A full stop after at least two letters (unlike `e.g.`), before a capital letter or the end.
SENTENCE_END = re.compile(r"(?<=[a-z)\]`'\"]{2})\.(?=\s+[A-Z]|$)")

SIGNATURE = (
    "What is the signature of `{name}`?",
    "Give the signature of `{name}`.",
    "Show me the signature of `{name}`.",
    "Which signature does `{name}` have?",
)
DEFAULTS = (
    "Which parameters of `{name}` have defaults, and which?",
    "Which defaults do the parameters of `{name}` have?",
    "List the parameters of `{name}` that have a default.",
)
PARAMETERS = (
    "Which parameters does `{name}` take?",
    "Name the parameters of `{name}`.",
    "What are the parameters of `{name}`, in order?",
)
PURPOSE = (
    "What does `{name}` do, in one sentence?",
    "In one sentence, what is `{name}` for?",
    "Say in one sentence what `{name}` does.",
)
RAISES = (
    "Which exceptions does the code of `{name}` raise?",
    "What does `{name}` raise itself?",
    "List the exceptions in the raise statements of `{name}`.",
)


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    is_fact: bool
    """True if the answer has one right wording; a summary has many."""


class Subject(NamedTuple):
    """An object to ask about, and the text about it that the user pastes."""

    entry: Entry
    text: str
    """Its source, or its help text if there is no source."""
    raised: tuple[str, ...] | None
    """Exceptions in the raise statements of the text; None if they are unknown."""

    @property
    def owner(self) -> str:
        """Class of a method, or module of a function."""
        return self.entry.name.rpartition(".")[0]


def subject_of(entry: Entry) -> Subject | None:
    """Return an object to ask about; None if its text would not contain the answers."""
    if entry.kind == "class" or entry.signature is None or entry.call is None:
        return None
    if not MIN_SUMMARY_CHARACTERS <= len(first_sentence(entry)) <= MAX_SUMMARY_CHARACTERS:
        return None
    wanted = signatures.of_object(entry.name)
    if wanted is None or not parameter_names(entry):
        return None
    source = stdlib_docs.source(entry.name)
    if source is None:
        text, raised = help_text(entry), None
    else:
        definition = _definition(source)
        if definition is None or definition.name != entry.name.rpartition(".")[2]:
            return None
        # With a decorator or a computed default, the signature differs from the written one.
        if signatures.of_definition(definition) != wanted:
            return None
        # A docstring that is set elsewhere is not in the text.
        if (ast.get_docstring(definition) or "").strip() != entry.docstring:
            return None
        text, raised = source, exceptions_raised(definition)
    is_right = signatures.parse(str(entry.signature)) == wanted
    return Subject(entry, text, raised) if is_right else None


def help_text(entry: Entry) -> str:
    """Return a signature and its docstring, as `help()` shows them."""
    body = "\n".join(f"    {line}".rstrip() for line in entry.docstring.splitlines())
    return f"{entry.call or entry.name}\n{body}"


def listing(entries: Sequence[Entry]) -> str:
    """Return the signature and first sentence of several objects, like the index of a manual."""
    return "\n".join(f"{entry.call}\n    {first_sentence(entry)}" for entry in entries)


def first_sentence(entry: Entry) -> str:
    """Return the first sentence of the docstring, on one line, with a full stop."""
    sentence = SENTENCE_END.split(entry.summary, maxsplit=1)[0]
    return sentence.rstrip(" .:;,") + "."


def signature_turn(entry: Entry, generator: random.Random) -> Turn:
    """Return the question for a signature; the answer has the name as in the pasted definition."""
    call = f"{entry.name.rpartition('.')[2]}{(entry.call or '').removeprefix(entry.name)}"
    return _turn(SIGNATURE, entry, f"The signature is `{call}`.", generator)


def other_turns(
    entry: Entry, raised: tuple[str, ...] | None, generator: random.Random
) -> list[Turn]:
    """Return the other questions about an object, its purpose last.

    Args:
        raised: exceptions that its source raises; None if they are unknown.
    """
    turns = []
    if entry.signature is not None and parameter_names(entry):
        # Not if a default is not an expression, such as `<object object>`.
        if signatures.parse(str(entry.signature)) is not None:
            turns.append(_turn(DEFAULTS, entry, _defaults_answer(entry), generator))
        parameters = f"It takes {_joined(parameter_names(entry))}."
        turns.append(_turn(PARAMETERS, entry, parameters, generator))
    if raised is not None:
        answer = f"It raises {_joined(raised)}." if raised else "It raises no exception itself."
        turns.append(_turn(RAISES, entry, answer, generator))
    turns.append(_turn(PURPOSE, entry, first_sentence(entry), generator)._replace(is_fact=False))
    return turns


def parameter_names(entry: Entry) -> list[str]:
    """Return the names of the parameters, with their stars, without `self` or `cls`."""
    empty = inspect.Parameter.empty
    return [
        str(parameter.replace(default=empty, annotation=empty)) for parameter in _parameters(entry)
    ]


def exceptions_raised(
    definition: ast.FunctionDef | ast.AsyncFunctionDef,
) -> tuple[str, ...] | None:
    """Return the exceptions that a function's raise statements name, in the order of the text.

    Returns:
        None if a statement raises anything but a class by its name.
    """
    raised = [node for node in ast.walk(definition) if isinstance(node, ast.Raise) and node.exc]
    raised.sort(key=lambda node: (node.lineno, node.col_offset))
    names = []
    for node in raised:
        named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        # A lower-case name may be a variable, or a method that makes the exception.
        if not isinstance(named, ast.Name | ast.Attribute) or ast.unparse(named).islower():
            return None
        names.append(ast.unparse(named))
    return tuple(dict.fromkeys(names))


def _turn(wordings: Sequence[str], entry: Entry, answer: str, generator: random.Random) -> Turn:
    return Turn(generator.choice(wordings).format(name=entry.name), answer, is_fact=True)


def _defaults_answer(entry: Entry) -> str:
    given = [
        f"{parameter.name}={parameter.default!r}"
        for parameter in _parameters(entry)
        if parameter.default is not inspect.Parameter.empty
    ]
    if not given:
        return "None of its parameters has a default."
    return f"The defaults are {_joined(given)}."


def _parameters(entry: Entry) -> list[inspect.Parameter]:
    assert entry.signature is not None
    parameters = list(entry.signature.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    return parameters


def _joined(names: Sequence[str]) -> str:
    """Return `a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join(part for part in (", ".join(quoted[:-1]), quoted[-1]) if part)


def _definition(source: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a lambda within an expression, or a line cut out of its block
        return None
    match statements:
        case [ast.FunctionDef() | ast.AsyncFunctionDef() as definition]:
            return definition
    return None
