"""HTML pages of the report, made from the Jinja templates in `report/templates`.

A page is one file: it loads nothing from outside itself and runs no script. Its texts come from
strangers, so every value that a template prints is escaped, and characters without a shape
(controls, changes of writing direction) are replaced by their code points. Only HTML that a
template made itself is printed as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Path(__file__).parent / "report" / "templates"
CODE = re.compile("`([^`]+)`")
KEPT: Mapping[str, str] = MappingProxyType({"\n": "\n", "\t": "\t"})


def render(template: str, **values: object) -> Markup:
    """A template of `report/templates` filled in: a whole page, or a part of one.

    Raises:
        UndefinedError: the template prints a value that was not given.
    """
    return Markup(ENVIRONMENT.get_template(template).render(values))


def visible(text: str, marks: Mapping[str, str] = KEPT) -> Markup:
    """Text as HTML, safe inside an element and inside a quoted attribute.

    A character without a shape is replaced by its code point: `<s>U+202E</s>`.

    Args:
        marks: HTML to print in place of single characters.
    """
    if text.isprintable() and marks is KEPT:
        return escape(text)
    return Markup(
        "".join(
            marks[character]
            if character in marks
            else escape(character)
            if character.isprintable()
            else named(character)
            for character in text
        )
    )


def named(character: str) -> str:
    """The code point of a character, as HTML."""
    return f"<s>U+{ord(character):04X}</s>"


def with_code(text: str) -> Markup:
    """Text as HTML in which words between backticks are code."""
    return Markup(CODE.sub(r"<code>\1</code>", str(visible(text))))


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """`1 token`, `1,234 tokens`."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def share(part: int, whole: int) -> str:
    """`12.3%`. A part that exists is never shown as 0.0%, nor an incomplete one as 100.0%."""
    if not whole:
        return "–"
    if 0 < part < whole / 1000:
        return "< 0.1%"
    if whole * 0.999 < part < whole:
        return "> 99.9%"
    return f"{part / whole:.1%}"


def _printed(value: object) -> object:
    """A value as a template prints it: text made `visible`, HTML and numbers unchanged."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return visible(value)
    return value


ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    finalize=_printed,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters.update(visible=visible, with_code=with_code, number="{:,}".format)
ENVIRONMENT.globals.update(counted=counted, share=share)
