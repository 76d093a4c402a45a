from __future__ import annotations

import inspect
import textwrap

import pytest

from tests import signature_answers
from workflow_scripts.demo import signatures

NAME = "textwrap.shorten"  # (text, width, **kwargs)
DUMPS = "json.dumps"


def test_the_reference_form_is_right():
    assert signature_answers.is_right(
        f"The signature is `{NAME}{inspect.signature(textwrap.shorten)}`.", NAME
    )


@pytest.mark.parametrize(
    "answer",
    [
        "`shorten(text, width, **kwargs)`",
        "def shorten(text, width, **kwargs):",
        "It is called as textwrap.shorten( text,width,\n **kwargs ) and nothing else.",
        "Given some text (any), use `textwrap.shorten(text, width, **kwargs)`",
    ],
)
def test_any_prose_around_the_right_signature_is_accepted(answer):
    assert signature_answers.is_right(answer, NAME)


@pytest.mark.parametrize(
    "answer",
    [
        "The signature is `textwrap.shorten(text, width=70, **kwargs)`.",  # one default too many
        "The signature is `textwrap.shorten(text, width)`.",  # a parameter is missing
        "The signature is `textwrap.shorten(width, text, **kwargs)`.",  # wrong order
        "The signature is `textwrap.shorten(text, width, *kwargs)`.",  # wrong kind
        "The signature is `textwrap.shorten(text, *, width, **kwargs)`.",  # wrong kind
        "The signature is `textwrap.shorten(text, size, **kwargs)`.",  # wrong name
        "The signature is `textwrap.wrap(text, width, **kwargs)`.",  # another object's name
        "The signature is `reshorten(text, width, **kwargs)`.",
        "The signature is `textwrap.shorten(text, width, **kwargs",  # truncated
        "It collapses and truncates the given text to fit in the given width.",  # prose
        "It takes (text, width, **kwargs).",  # no name
        "",
    ],
)
def test_everything_else_is_wrong(answer):
    assert not signature_answers.is_right(answer, NAME)


def test_a_wrong_default_is_wrong():
    right = f"json.dumps{inspect.signature(__import__('json').dumps)}"
    assert signature_answers.is_right(right, DUMPS)
    assert "ensure_ascii=True" in right
    assert not signature_answers.is_right(
        right.replace("ensure_ascii=True", "ensure_ascii=False"), DUMPS
    )


def test_the_first_signature_counts():
    right, wrong = "shorten(text, width, **kwargs)", "shorten(text)"
    assert signature_answers.is_right(f"{right} or {wrong}", NAME)
    assert not signature_answers.is_right(f"{wrong} or {right}", NAME)


def test_defaults_are_compared_as_python_and_not_as_text():
    first = signatures.parse("(a='x', b=0o666, c=(1, 2))")
    assert first == signatures.parse('(a="x",b=438,  c=(1,2))')
    assert first != signatures.parse("(a='y', b=438, c=(1, 2))")
    assert first != signatures.parse("(a='x', b='438', c=(1, 2))")


@pytest.mark.parametrize("other", ["(a, b=1)", "(a, /, b=1, *, c)", "(a, b=1, /)", "(*, a, b=1)"])
def test_kinds_are_compared(other):
    wanted = signatures.parse("(a, /, b=1)")
    assert signature_answers.agree(wanted, wanted)
    assert not signature_answers.agree(signatures.parse(other), wanted)


def test_an_annotation_may_be_left_out_but_not_be_wrong():
    wanted = signatures.parse("(a: int, b: str = '') -> bool")
    for right in (
        "(a: int, b: str = '') -> bool",
        "(a, b='')",
        "(a, b: str='')",
        "(a, b='') -> bool",
    ):
        assert signature_answers.agree(signatures.parse(right), wanted)
    for wrong in ("(a: str, b='')", "(a, b='') -> int", "(a: int, b: str)"):
        assert not signature_answers.agree(signatures.parse(wrong), wanted)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("`f(a, b=(1, 2), c=g(')'))` is it.", "(a, b=(1, 2), c=g(')'))"),
        ("`f(a) -> dict[str, int]`.", "(a) -> dict[str, int]"),
        ("f(a) -> int", "(a) -> int"),
        ("f(a) -> int.", "(a) -> int"),
        ("call f() or f(a, /, *b)", "()"),
        ("first f(1 + 2), then f(a)", "(a)"),
    ],
)
def test_a_signature_is_found_to_its_last_parenthesis(answer, text):
    assert signature_answers.find(answer, "module.f") == signatures.parse(text) is not None


def test_other_text_is_not_a_signature():
    for text in ("", "(", "(a=)", "(a): pass\ndef g(b)", "(a\0)", "(1)"):
        assert signatures.parse(text) is None


def test_an_object_without_a_signature_cannot_be_compared():
    assert signatures.of_object("builtins.range") is None
    with pytest.raises(ValueError, match=r"builtins\.range"):
        signature_answers.is_right("range(stop)", "builtins.range")
    with pytest.raises(LookupError, match=r"textwrap\.shrink"):
        signature_answers.is_right("shrink()", "textwrap.shrink")
