"""Signatures as text: found in an answer, and compared with `inspect.signature`.

Two signatures agree where they have the same parameters in the same order: equal names, equal kinds
(positional-only, keyword-only, `*` and `**`), and the same defaults. Defaults are compared as
syntax trees, so that `'x'` equals `"x"` and `0o666` equals `438`. An annotation may be left out of
an answer; one that is given must be the right one.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from workflow_scripts.demo import stdlib_docs


class Parameter(NamedTuple):
    """One parameter, with its default and annotation as dumped syntax trees."""

    kind: str
    name: str
    default: str | None
    annotation: str | None


class ParsedSignature(NamedTuple):
    """A signature read from text."""

    parameters: tuple[Parameter, ...]
    returns: str | None


def parse(text: str) -> ParsedSignature | None:
    """The signature that `(…)` or `(…) -> …` spells; None where it is not Python.

    Args:
        text: what follows the name in a `def` statement, without the colon.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an invalid escape in a model's answer
        try:
            statements = ast.parse(f"def f{text}: ...").body
        except (SyntaxError, ValueError):  # ValueError: a null byte
            return None
    if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef):
        return None
    return of_definition(statements[0])


def of_definition(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> ParsedSignature:
    """The signature of a `def` statement."""
    returns = dump(definition.returns)
    return ParsedSignature(tuple(_parameters(definition.args)), returns)


def of_object(name: str) -> ParsedSignature | None:
    """What `inspect.signature` says of an object of the standard library; None where it says
    nothing, or something that is not Python (a default such as `<object object>`).

    Args:
        name: qualified, `textwrap.TextWrapper.wrap`.
    """
    try:
        signature = inspect.signature(stdlib_docs.member(name))
    except (TypeError, ValueError):
        return None
    return parse(str(signature))


def find(answer: str, name: str) -> ParsedSignature | None:
    """The first signature that an answer gives for an object; None where there is none.

    Args:
        answer: any text, with code in it or not.
        name: qualified; its last part must stand before the parentheses.
    """
    called = re.compile(rf"(?<!\w){re.escape(name.rpartition('.')[2])}\(")
    for match in called.finditer(answer):
        opens = match.end() - 1
        for closing in re.finditer(r"\)", answer[opens:]):
            end = opens + closing.end()
            found = parse(answer[opens:end])
            if found is None:
                continue
            returns = re.match(r" -> ([^`\n]+?)(?=[`:\n]|\.?$)", answer[end:])
            return (returns and parse(answer[opens : end + returns.end()])) or found
    return None


def is_right(answer: str, name: str) -> bool:
    """Whether an answer gives an object's signature as `inspect.signature` does.

    Raises:
        ValueError: the object has no signature to compare with.
    """
    wanted = of_object(name)
    if wanted is None:
        raise ValueError(f"{name}: inspect.signature gives nothing to compare with")
    found = find(answer, name)
    return found is not None and agree(found, wanted)


def agree(found: ParsedSignature, wanted: ParsedSignature) -> bool:
    """Whether a signature is the wanted one; annotations may be left out of it."""
    if [parameter[:3] for parameter in found.parameters] != [
        parameter[:3] for parameter in wanted.parameters
    ]:
        return False
    given = [(parameter.annotation, right.annotation) for parameter, right in zip(
        found.parameters, wanted.parameters, strict=True
    )]  # fmt: skip
    return all(
        annotation in (None, right)
        for annotation, right in [*given, (found.returns, wanted.returns)]
    )


def dump(node: ast.expr | None) -> str | None:
    """An expression's syntax tree, without positions."""
    return None if node is None else ast.dump(node)


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = "positional-only" if number < len(arguments.posonlyargs) else "positional"
        yield Parameter(kind, argument.arg, dump(default), dump(argument.annotation))
    if arguments.vararg:
        yield Parameter("*", arguments.vararg.arg, None, dump(arguments.vararg.annotation))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter("keyword-only", argument.arg, dump(default), dump(argument.annotation))
    if arguments.kwarg:
        yield Parameter("**", arguments.kwarg.arg, None, dump(arguments.kwarg.annotation))
