from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import assume, example, given, strategies as st
from jinja2 import UndefinedError

from workflow_scripts import pages

HOSTILE = "<script>alert(1)</script>\"'&amp;\u202e\u2066\x00\x1b\u200b\u2028\ufeff"
any_text = st.text(st.sampled_from(HOSTILE + "\n\t aé日א") | st.characters(codec="utf-8"))


class Read(HTMLParser):
    """Tags, text and attributes of HTML, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def has_shape(character: str) -> bool:
    return character in " \n\t" or unicodedata.category(character)[0] not in "CZ"


@given(text=any_text)
def test_every_text_is_read_back_with_the_invisible_characters_named(text):
    read = Read(f"<p>{pages.visible(text)}</p>")
    assert set(read.tags) <= {"p", "s"}
    assert read.text == "".join(
        character if has_shape(character) else f"U+{ord(character):04X}" for character in text
    )


@given(text=st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "M"])))
def test_a_text_stays_within_the_quotes_of_an_attribute(text):
    assert Read(f'<p title="{pages.visible(text)}">').attributes == [("title", text)]


def test_marks_take_the_place_of_characters():
    assert pages.visible("a b\nc", {" ": "␣"}) == "a␣b<s>U+000A</s>c"


def test_words_between_backticks_are_code_and_the_text_is_no_markup():
    assert pages.with_code("ask `a < b` & `c`") == (
        "ask <code>a &lt; b</code> &amp; <code>c</code>"
    )
    assert pages.with_code("one ` alone") == "one ` alone"


def hostile_page() -> str:
    """A page whose every text is hostile."""
    texts = [HOSTILE, HOSTILE]
    table = {"title": HOSTILE, "note": HOSTILE, "conclusions": texts}
    table |= {"header": texts, "rows": [texts, texts]}
    return pages.render("table.html.j2", table=table, plots=[(HOSTILE, "", HOSTILE)])


def test_a_page_runs_nothing_and_asks_for_nothing_outside_itself():
    text = hostile_page()
    read = Read(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not {"src", "href"} & {name for name, _ in read.attributes}
    assert not re.search(r"@import|url\(|https?:", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes


def test_every_printed_text_is_escaped_without_being_told_to():
    text = hostile_page()
    assert "&lt;script&gt;" in text and "U+202E" in text
    assert all(has_shape(character) for character in text)


@pytest.mark.parametrize("path", sorted(pages.TEMPLATES.glob("*.j2")), ids=lambda path: path.name)
def test_no_template_turns_escaping_off(path):
    assert not re.search(r"\|\s*safe|autoescape", path.read_text(encoding="utf-8"))


def test_a_value_that_was_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="table"):
        pages.render("table.html.j2", plots=[])


@given(part=st.integers(0, 10**4) | st.integers(0, 10**7), rest=st.integers(0, 10**7))
@example(part=1, rest=10**6)
@example(part=10**6, rest=1)
def test_a_share_is_shown_as_all_or_nothing_only_if_it_is(part, rest):
    whole = part + rest
    assume(whole)
    shown = pages.share(part, whole)
    assert (shown == "0.0%") == (not part)
    assert (shown == "100.0%") == (not rest)
    if shown[0] not in "<>":
        assert abs(float(shown.rstrip("%")) / 100 - part / whole) <= 0.0005 + 1e-9


def test_a_share_of_nothing_is_a_dash():
    assert pages.share(0, 0) == "–"


@pytest.mark.parametrize(("n", "expected"), [(0, "0 rows"), (1, "1 row"), (1234, "1,234 rows")])
def test_a_noun_agrees_with_its_number(n, expected):
    assert pages.counted(n, "row") == expected


def palettes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(
        r":root \{(.*?)\}", (pages.TEMPLATES / "pages.css").read_text(), flags=re.DOTALL
    )
    return {
        mode: dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        for mode, block in (("light", light), ("dark", dark))
    }


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "ground", "least"),
    [
        # WCAG 2.2 AA: 4.5 for text, 3 for other shapes that must be distinguishable.
        *[(ink, "paper", 4.5) for ink in ("text", "quiet", "cut")],
        *[("text", "raised", 4.5), ("learned-text", "learned", 4.5)],
        *[("control-text", "control", 4.5), ("control-text", "learned", 4.5)],
        *[(ink, "paper", 3) for ink in ("kept", "lost", "plain", "learned-line")],
        *[("document", "paper", 3), ("neighbour", "paper", 3), ("document", "neighbour", 2)],
    ],
)
def test_colors_have_enough_contrast_with_their_background(mode, ink, ground, least):
    palette = palettes()[mode]
    assert contrast(palette[ink], palette[ground]) >= least
