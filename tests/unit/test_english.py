"""Plain English: faults of style that kept coming back, in code, rules and documentation."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

CODE = [
    path
    for pattern in ("workflow_scripts/**/*.py", "rules/*.smk", "Snakefile")
    for path in sorted(REPOSITORY.glob(pattern))
]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "config/**/*.md", "data/*.md", "profiles/*.md")
    for path in sorted(REPOSITORY.glob(pattern))
]
ODD = re.compile(
    r"\b(beside|anew|thereof|therein|whereof|in vain|so many|held against|wants? an?"
    r"|(?<!there )(?:is|are) no (?:list|object|number|text|whole|release|file|folder|model|run"
    r"|rank|Hub|regular|function|JSON|Python|mean|expression))\b"
)
"""Plain: "next to", "again", "N", "compared with", "needs", "is not a"."""
FRAGMENT = re.compile(r"(Of|Whether|That|As) [a-z`]")
QUESTION = re.compile(r"(What|Where|How) [a-z`]")
"""Both name no thing. "Shape of a tensor", "True if …", "Number of …" do. An attribute may begin
with a question: in a table, its name is next to it."""


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def odd_words(text: str) -> list[str]:
    return [match[0] for match in ODD.finditer(text)]


def prose_of_code(source: str) -> Iterator[str]:
    """Comments and texts, those of f-strings too."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            yield token.string


def fragments(source: str) -> Iterator[str]:
    """First lines of docstrings that name no thing."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                text, faults = ast.get_docstring(node) or "", (FRAGMENT, QUESTION)
            case ast.Expr(value=ast.Constant(value=str() as text)):
                faults = (FRAGMENT,)
            case _:
                continue
        if any(fault.match(text) for fault in faults):
            yield text.splitlines()[0]


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_code_is_in_plain_words(path):
    found = [word for text in prose_of_code(path.read_text("utf-8")) for word in odd_words(text)]
    assert not found


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_a_page_is_in_plain_words(path):
    assert not odd_words(path.read_text("utf-8"))


@pytest.mark.parametrize("path", [path for path in CODE if path.suffix == ".py"], ids=relative)
def test_a_docstring_names_what_it_describes(path):
    assert not list(fragments(path.read_text("utf-8")))


def test_the_faults_are_found():
    assert odd_words("a report beside the scores, made anew") == ["beside", "anew"]
    assert odd_words("messages are no list; there is no list; kept besides") == ["are no list"]
    source = 'def f():\n    """What it does."""\n\n\na = 1\n"""Whether it is."""\nb = 1\n"""How."""'
    assert list(fragments(source)) == ["What it does.", "Whether it is."]
