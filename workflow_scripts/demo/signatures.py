"""Signatures, read from text, from a definition or from an object, so that they can be compared.

Parameters have a name, a kind (positional-only, keyword-only, `*` and `**`), a default and an
annotation. Defaults and annotations are syntax trees, so that `'x'` equals `"x"` and `0o666`
equals `438`.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from workflow_scripts.demo import stdlib_docs


class Parameter(NamedTuple):
    """One parameter; its default and annotation are dumped syntax trees."""

    kind: str
    name: str
    default: str | None
    annotation: str | None


class ParsedSignature(NamedTuple):
    """A signature read from text."""

    parameters: tuple[Parameter, ...]
    returns: str | None


def parse(text: str) -> ParsedSignature | None:
    """Return the signature that `(…)` or `(…) -> …` spells; None if it is not Python.

    Args:
        text: the text after the name in a `def` statement, without the colon.
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
    """Return the signature of a `def` statement."""
    return ParsedSignature(tuple(_parameters(definition.args)), _dump(definition.returns))


def of_object(name: str) -> ParsedSignature | None:
    """Return the signature that `inspect.signature` gives for an object of the standard library.

    Args:
        name: qualified name, `textwrap.TextWrapper.wrap`.
    Returns:
        None if there is no signature, or one that is not Python (a default `<object object>`).
    """
    try:
        signature = inspect.signature(stdlib_docs.member(name))
    except (TypeError, ValueError):
        return None
    return parse(str(signature))


def _dump(node: ast.expr | None) -> str | None:
    """Return an expression's syntax tree as text, without positions."""
    return None if node is None else ast.dump(node)


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = "positional-only" if number < len(arguments.posonlyargs) else "positional"
        yield Parameter(kind, argument.arg, _dump(default), _dump(argument.annotation))
    if arguments.vararg:
        yield Parameter("*", arguments.vararg.arg, None, _dump(arguments.vararg.annotation))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter("keyword-only", argument.arg, _dump(default), _dump(argument.annotation))
    if arguments.kwarg:
        yield Parameter("**", arguments.kwarg.arg, None, _dump(arguments.kwarg.annotation))
