from __future__ import annotations

import ast
import inspect
import json
import textwrap

import pytest

from workflow_scripts.demo import stdlib_docs


@pytest.fixture(scope="module")
def entries():
    return stdlib_docs.entries()


def test_there_is_enough_to_ask_about(entries):
    # No object is in two of the demo's chats, and only a third of the objects can be asked about.
    assert len(entries) > 2000
    assert {entry.kind for entry in entries} == {"function", "class", "method"}


def test_names_and_docstrings_are_unique_and_sorted(entries):
    names = [entry.name for entry in entries]
    assert names == sorted(set(names))
    assert len({entry.docstring for entry in entries}) == len(entries)


def test_no_entry_is_empty(entries):
    for entry in entries:
        assert entry.docstring == entry.docstring.strip() != ""
        assert entry.summary == " ".join(entry.summary.split()) != ""


def test_no_memory_address_is_left(entries):
    for entry in entries:
        assert " at 0x" not in entry.docstring
        assert " at 0x" not in (entry.call or "")


def test_entries_equal_the_interpreters_documentation(entries):
    by_name = {entry.name: entry for entry in entries}
    dumps = by_name["json.dumps"]
    assert dumps.kind == "function"
    assert dumps.docstring == inspect.getdoc(json.dumps).strip()
    assert dumps.call == f"json.dumps{inspect.signature(json.dumps)}"
    assert by_name["textwrap.TextWrapper"].kind == "class"
    assert by_name["textwrap.TextWrapper.wrap"].signature == inspect.signature(
        textwrap.TextWrapper.wrap
    )


def test_private_names_are_left_out(entries):
    assert not [entry.name for entry in entries if entry.name.rsplit(".")[-1].startswith("_")]


def test_module_sources_are_python():
    sources = stdlib_docs.module_sources()
    assert len(sources) > 100
    for source in sources[:20]:
        ast.parse(source)


def test_no_chat_asks_about_an_unlisted_docstring():
    unlisted = stdlib_docs.unlisted_docstrings()
    assert len(set(unlisted)) == len(unlisted) > 200
    asked_about = {entry.docstring for entry in stdlib_docs.entries()}
    assert asked_about.isdisjoint(unlisted)
    # 150,000 characters without idlelib and tkinter, which some distributions leave out.
    assert sum(map(len, unlisted)) > 100_000


def test_an_entrys_name_finds_its_object_and_its_source(entries):
    assert stdlib_docs.member("json.dumps") is json.dumps
    assert stdlib_docs.member("textwrap.TextWrapper.wrap") is textwrap.TextWrapper.wrap
    expected = textwrap.dedent(inspect.getsource(textwrap.TextWrapper.wrap)).strip()
    assert stdlib_docs.source("textwrap.TextWrapper.wrap") == expected
    assert expected.startswith("def wrap(self, text):\n    ")
    for entry in entries:
        assert stdlib_docs.member(entry.name).__doc__


@pytest.mark.parametrize("name", ["math.gcd", "textwrap.shrink", "no_such_module.f", "textwrap"])
def test_an_object_without_source_has_none(name):
    assert stdlib_docs.source(name) is None


def test_the_error_for_an_unknown_name_contains_it():
    with pytest.raises(LookupError, match=r"textwrap\.TextWrapper\.shrink"):
        stdlib_docs.member("textwrap.TextWrapper.shrink")
