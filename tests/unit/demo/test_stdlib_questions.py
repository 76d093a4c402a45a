from __future__ import annotations

import ast
import inspect
import random
import re
import textwrap
import threading

import pytest

from tests import signature_answers
from workflow_scripts.demo import signatures, stdlib_docs, stdlib_questions
from workflow_scripts.demo.stdlib_docs import Entry


@pytest.fixture(scope="module")
def subjects():
    found = map(stdlib_questions.subject_of, stdlib_docs.entries())
    return {one.entry.name: one for one in found if one is not None}


def is_source(one):
    return one.text.startswith(("def ", "async def ", "@"))


def answers_about(one, seed=0):
    generator = random.Random(seed)
    turns = stdlib_questions.other_turns(one.entry, one.raised, generator)
    return {turn.answer for turn in turns}


def entry_of(function, docstring="Does it well."):
    name = f"textwrap.{function.__name__}"
    return Entry(name, "function", inspect.signature(function), docstring)


def test_there_is_enough_to_ask_about(subjects):
    assert len(subjects) >= 1_000
    assert sum(not is_source(one) for one in subjects.values()) >= 200  # built in: only help texts
    assert sum(bool(one.raised) for one in subjects.values()) >= 100


def test_every_signature_follows_from_the_pasted_text(subjects):
    for name, one in subjects.items():
        turn = stdlib_questions.signature_turn(one.entry, random.Random(0))
        assert signature_answers.asked_signature(turn.question) == name
        assert signature_answers.is_right(turn.answer, name)
        if not is_source(one):
            assert one.text.startswith(f"{one.entry.call}\n")
        else:
            definition = ast.parse(one.text).body[0]
            assert definition.name == name.rpartition(".")[2]
            assert signatures.of_definition(definition) == signatures.of_object(name)


def test_every_purpose_is_in_the_pasted_text(subjects):
    for one in subjects.values():
        sentence = stdlib_questions.first_sentence(one.entry)
        assert sentence.removesuffix(".") in " ".join(one.entry.docstring.split())
        # A docstring with an escape is spelled differently in the source.
        if "\\" not in one.text:
            assert sentence.removesuffix(".") in " ".join(one.text.split())


def test_the_answers_about_a_known_function(subjects):
    shorten, release = (
        subjects["textwrap.shorten"],
        subjects["threading.BoundedSemaphore.release"],
    )
    assert answers_about(shorten) == {
        "None of its parameters has a default.",
        "It takes `text`, `width` and `**kwargs`.",
        "Collapse and truncate the given text to fit in the given width.",
        "It raises no exception itself.",
    }
    assert inspect.getsource(threading.BoundedSemaphore.release).count("raise ValueError(") == 2
    assert answers_about(release) >= {
        "The defaults are `n=1`.",
        "It takes `n`.",
        "It raises `ValueError`.",
    }
    wrap = subjects["textwrap.TextWrapper.fill"]
    assert wrap.owner == "textwrap.TextWrapper"
    assert "It takes `text`." in answers_about(wrap)  # without `self`
    assert textwrap.dedent(inspect.getsource(textwrap.TextWrapper.fill)).strip() == wrap.text


def test_defaults_are_those_of_the_signature():
    def shorten(text, width=70, *words, sep=" ", **rest): ...

    turns = stdlib_questions.other_turns(entry_of(shorten), None, random.Random(0))
    assert "The defaults are `width=70` and `sep=' '`." in {turn.answer for turn in turns}
    assert "It takes `text`, `width`, `*words`, `sep` and `**rest`." in {
        turn.answer for turn in turns
    }


def test_no_question_asks_for_a_default_that_is_not_an_expression():
    without_text = object()

    def shorten(text, width=without_text): ...

    turns = stdlib_questions.other_turns(entry_of(shorten), None, random.Random(0))
    assert not [turn for turn in turns if "0x" in turn.answer or "object" in turn.answer]
    assert "It takes `text` and `width`." in {turn.answer for turn in turns}


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Do it. Then stop.", "Do it."),
        ("Do it,\nin two lines.\n\nAnd more.", "Do it, in two lines."),
        ("Read a file, e.g. Windows' own. Done", "Read a file, e.g. Windows' own."),
        ("Like f(x). Returns y", "Like f(x)."),
        ("Of version 3.2 of it", "Of version 3.2 of it."),
        ("Arguments:", "Arguments."),
    ],
)
def test_the_first_sentence_ends_at_its_full_stop(docstring, sentence):
    assert stdlib_questions.first_sentence(Entry("a.b", "function", None, docstring)) == sentence


def raised_by(*lines):
    body = "\n".join(f"        {line}" for line in lines)
    (definition,) = ast.parse(f"def f(x):\n    if x:\n{body}").body
    return stdlib_questions.exceptions_raised(definition)


def test_exceptions_are_listed_by_name_once_and_in_order():
    assert raised_by("pass", "'raise TypeError'") == ()
    assert raised_by("raise") == ()  # raises the exception being handled
    assert raised_by("if x: raise ValueError(x)", "raise KeyError", "raise ValueError") == (
        "ValueError",
        "KeyError",
    )
    assert raised_by("raise queue.Empty from None") == ("queue.Empty",)


@pytest.mark.parametrize("raised", ["error", "self.error(x)", "errors[0]", "x.error", "f(x)(x)"])
def test_exceptions_are_unknown_if_a_variable_is_raised(raised):
    assert raised_by("raise ValueError", f"raise {raised}") is None


def test_a_function_under_another_name_is_left_out(subjects):
    # Its source is `def __hash_new(…)`.
    assert stdlib_docs.source("hashlib.new").startswith("def __hash_new(")
    assert "hashlib.new" not in subjects


def test_other_questions_do_not_ask_for_a_signature():
    for wording in (*stdlib_questions.DEFAULTS, *stdlib_questions.PURPOSE, ""):
        assert signature_answers.asked_signature(wording.format(name="json.dumps")) is None
    for wording in stdlib_questions.SIGNATURE:
        question = f"def dumps(obj): ...\n\n{wording.format(name='json.dumps')}"
        assert signature_answers.asked_signature(question) == "json.dumps"


def test_every_wording_names_the_object_once():
    for wordings in ("SIGNATURE", "DEFAULTS", "PARAMETERS", "PURPOSE", "RAISES"):
        for wording in getattr(stdlib_questions, wordings):
            assert re.findall(r"`[^`]*`", wording) == ["`{name}`"]
