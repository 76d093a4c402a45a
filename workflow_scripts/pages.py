"""A page for people: one HTML file that asks for nothing outside itself and runs no script.

What it shows was written by strangers, so every text goes through `visible`: nothing of it becomes
markup, and no invisible character (a control, a turn of writing direction) acts on the page.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

STYLE = Path(__file__).with_name("pages.css")
CODE = re.compile("`([^`]+)`")
AS_THEY_ARE: Mapping[str, str] = MappingProxyType({"\n": "\n", "\t": "\t"})
# The browser itself refuses what a page must not do, should a text ever get past `visible`.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    """A whole document.

    Args:
        title: text.
        body: HTML, below the title.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{visible(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body>\n<h1>{visible(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def visible(text: str, marks: Mapping[str, str] = AS_THEY_ARE) -> str:
    """Text as HTML, safe inside an element and a quoted attribute's.

    A character that has no shape of its own is named: `<s>U+202E</s>`.

    Args:
        marks: HTML in place of a character.
    """
    if text.isprintable() and marks is AS_THEY_ARE:
        return html.escape(text)
    return "".join(
        marks[character]
        if character in marks
        else html.escape(character)
        if character.isprintable()
        else named(character)
        for character in text
    )


def named(character: str) -> str:
    """HTML of a character's code point."""
    return f"<s>U+{ord(character):04X}</s>"


def paragraph(text: str) -> str:
    """HTML of a paragraph; what stands between backticks is code."""
    return f"<p>{_with_code(text)}</p>"


def remark(text: str) -> str:
    """The same, of what is said beside: how something was measured."""
    return f'<p class="quiet">{_with_code(text)}</p>'


def _with_code(text: str) -> str:
    return CODE.sub(r"<code>\1</code>", visible(text))


def facts(pairs: Mapping[str, str]) -> str:
    """HTML of a list of names and values, both texts."""
    items = "".join(
        f"<div><dt>{visible(name)}</dt><dd>{visible(value)}</dd></div>"
        for name, value in pairs.items()
    )
    return f"<dl>{items}</dl>"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, is_of_words: bool = False
) -> str:
    """HTML of a table of texts; the first cell of a row names it.

    Args:
        is_of_words: cells stand on the left and may break, where those of numbers do not.
    """

    def cells(texts: Sequence[str], *, of_body: bool) -> str:
        first, *others = map(visible, texts)
        scope = "row" if of_body else "col"
        tag = "td" if of_body else "th"
        inner = "".join(f"<{tag}>{other}</{tag}>" for other in others)
        return f'<tr><th scope="{scope}">{first}</th>{inner}</tr>'

    body = "\n".join(cells(row, of_body=True) for row in rows)
    kind = ' class="words"' if is_of_words else ""
    return (
        f'<div class="wide"><table{kind}><thead>{cells(header, of_body=False)}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """`1 token`, `1,234 tokens`."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def share(part: int, whole: int) -> str:
    """`12.3%`; what is there is never shown as nothing, nor what is less than all as all."""
    if not whole:
        return "–"
    if 0 < part < whole / 1000:
        return "< 0.1%"
    if whole * 0.999 < part < whole:
        return "> 99.9%"
    return f"{part / whole:.1%}"
