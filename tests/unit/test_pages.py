from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import assume, example, given, strategies as st

from workflow_scripts import pages

HOSTILE = "<script>alert(1)</script>\"'&amp;\u202e\u2066\x00\x1b\u200b\u2028\ufeff"
any_text = st.text(st.sampled_from(HOSTILE + "\n\t aé日א") | st.characters(codec="utf-8"))


class Read(HTMLParser):
    """What a browser would make of HTML: its tags, its text, its attributes."""

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


def test_a_paragraph_has_code_between_backticks_and_no_markup_of_the_text():
    assert pages.paragraph("ask `a < b` & `c`") == (
        "<p>ask <code>a &lt; b</code> &amp; <code>c</code></p>"
    )
    assert pages.remark("one ` alone") == '<p class="quiet">one ` alone</p>'


def test_a_page_runs_nothing_and_asks_for_nothing_outside_itself():
    text = pages.page(HOSTILE, f"<p>{pages.visible(HOSTILE)}</p>")
    read = Read(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not {"src", "href"} & {name for name, _ in read.attributes}
    assert not re.search(r"@import|url\(|https?:", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes


@given(part=st.integers(0, 10**4) | st.integers(0, 10**7), rest=st.integers(0, 10**7))
@example(part=1, rest=10**6)
@example(part=10**6, rest=1)
def test_a_share_is_all_or_nothing_only_where_it_is(part, rest):
    whole = part + rest
    assume(whole)
    shown = pages.share(part, whole)
    assert (shown == "0.0%") == (not part)
    assert (shown == "100.0%") == (not rest)
    if shown[0] not in "<>":
        assert abs(float(shown.rstrip("%")) / 100 - part / whole) <= 0.0005 + 1e-9


def test_a_share_of_nothing_is_no_number():
    assert pages.share(0, 0) == "–"


@pytest.mark.parametrize(("n", "expected"), [(0, "0 rows"), (1, "1 row"), (1234, "1,234 rows")])
def test_what_is_counted_agrees_with_its_number(n, expected):
    assert pages.counted(n, "row") == expected


def palettes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", pages.STYLE.read_text(), flags=re.DOTALL)
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
        # WCAG 2.2 AA: 4.5 for text, 3 for what else must be told apart.
        *[(ink, "paper", 4.5) for ink in ("text", "quiet", "cut")],
        *[("text", "raised", 4.5), ("learned-text", "learned", 4.5)],
        *[("control-text", "control", 4.5), ("control-text", "learned", 4.5)],
        *[(ink, "paper", 3) for ink in ("kept", "lost", "plain", "learned-line")],
        *[("document", "paper", 3), ("neighbour", "paper", 3), ("document", "neighbour", 2)],
    ],
)
def test_colors_stand_out_from_what_they_lie_on(mode, ink, ground, least):
    palette = palettes()[mode]
    assert contrast(palette[ink], palette[ground]) >= least
