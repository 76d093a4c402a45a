from __future__ import annotations

import re
import unicodedata

import ftfy
import pytest
from hypothesis import given, strategies as st

from workflow_scripts.chats import text_repair
from workflow_scripts.chats.text_repair import normalize_whitespace, repair_unicode

# Few characters, so that what ftfy repairs is frequent: mojibake of both kinds, controls, escapes.
TROUBLE = st.text(
    st.sampled_from("aZ .,?1\t\n\r\f\x00\x0b\x1b[31m\x7f\x80\x85\x99\xa0\xadéèÂÃÎÐ×âàœŒ€™œ“”«»²°¡")
    | st.sampled_from("\u0301\u0308\u2028\u2029\u200d\u206a\ufeff\ufffc\ufffdﬁＡｶ你ВГРСâÄ√≈ØÙœΒ"),
    max_size=24,
)
NO_SURROGATES = st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def mojibake(draw):
    """Return a text that was decoded, once or twice, with a wrong encoding."""
    text = draw(st.text(st.sampled_from("aé ü“”’…—ßñ你好жя€\n"), max_size=20))
    for _ in range(draw(st.integers(1, 2))):
        encoding = draw(st.sampled_from(["latin-1", "cp1252", "mac_roman", "cp1251"]))
        text = text.encode().decode(encoding, errors="replace")
    return text


TEXTS = st.one_of(TROUBLE, mojibake(), NO_SURROGATES)


@pytest.mark.parametrize(
    ("damaged", "repaired"),
    [
        ("schÃ¶n", "schön"),
        ("it doesnâ€™t work", "it doesn’t work"),
        ("dÃ©jÃ\xa0 vu", "déjà vu"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("nul\x00 and bell\x07", "nul and bell"),
        ("\ufeffa byte order mark", "a byte order mark"),
        ("e\u0301", "é"),
        ("Windows\x92 quote", "Windows’ quote"),
    ],
)
def test_damage_is_undone(damaged, repaired):
    assert repair_unicode(damaged) == repaired


@pytest.mark.parametrize(
    "text",
    [
        "if a &lt; b &amp;&amp; c: &quot;é&quot;",
        "“curly” ‘quotes’ — and… dashes",
        "ﬁligree, ＦＵＬＬ　ＷＩＤＴＨ, ｶﾀｶﾅ, 10³ µm, ½",
        "def f():\n\treturn 'tab'\f\n",
        "👩‍👩‍👧 family, \u200fright to left\u200e, soft\xadhyphen",
        "Voilà, ça marche : œuvre, naïveté, ÂME",
        "Москва, Αθήνα, القاهرة, 東京, กรุงเทพ, हिन्दी",
    ],
)
def test_intended_text_is_not_changed(text):
    assert repair_unicode(text) == text


@pytest.mark.parametrize(
    "meant", ["&lt;b&gt; &amp;", "“curly” ‘quotes’", "ﬁligree", "ＦＵＬＬ", "10³"]
)
def test_intended_text_next_to_damage_is_not_changed(meant):
    assert repair_unicode(f"schÃ¶n {meant}\x07") == f"schön {meant}"


@given(text=TEXTS)
def test_a_second_repair_changes_nothing(text):
    repaired = repair_unicode(text)
    assert repair_unicode(repaired) == repaired


@given(text=TEXTS)
def test_a_repaired_text_is_composed_and_has_no_control_character(text):
    repaired = repair_unicode(text)
    assert unicodedata.is_normalized("NFC", repaired)
    controls = {c for c in repaired if unicodedata.category(c) == "Cc"}
    assert controls <= set("\n\t\f")


@given(text=TEXTS)
def test_one_pass_equals_ftfy_on_the_whole_text(text):
    """ftfy would not change the lines that it is not given."""
    expected = ftfy.fix_text(text, text_repair.REPAIRS)
    assert text_repair._repair_lines(text) == re.sub("[\x81\x8d\x8f\x90\x9d]", "", expected)
    if text_repair._is_plain(text):
        assert ftfy.fix_text(text, text_repair.REPAIRS) == text


@given(text=st.text(st.characters(max_codepoint=127)))
def test_an_ascii_text_changes_only_in_controls_and_line_breaks(text):
    assert repair_unicode(text) == ftfy.fix_text(text, text_repair.REPAIRS)


def test_plain_ascii_is_returned_as_the_same_object():
    text = "How do I sort a list?\n\n\tUse `sorted(x)`."
    assert repair_unicode(text) is text


def test_ftfy_is_not_called_for_the_plain_lines_of_a_text(monkeypatch):
    seen = []
    fix_text = ftfy.fix_text

    def watched(line, config):
        seen.append(line)
        return fix_text(line, config)

    monkeypatch.setattr(ftfy, "fix_text", watched)
    assert repair_unicode("plain\nschÃ¶n\ncafé\nplain") == "plain\nschön\ncafé\nplain"
    assert seen == ["schÃ¶n\n"]


@given(text=st.text(st.sampled_from("aé\n\ud800\udc00\udfff Ã¶")))
def test_surrogates_are_not_repaired(text):
    surrogates = [c for c in text if "\ud800" <= c <= "\udfff"]
    assert [c for c in repair_unicode(text) if "\ud800" <= c <= "\udfff"] == surrogates


WHITE_SPACE = st.text(st.sampled_from("ab \t\n\r\xa0\u3000\u2003"), max_size=30)


@given(text=WHITE_SPACE)
def test_collapsed_text_has_no_runs_of_blanks_nor_of_empty_lines(text):
    collapsed = normalize_whitespace(text, "collapse")
    assert collapsed.split() == text.split()
    assert "  " not in collapsed and "\n\n\n" not in collapsed
    assert all(line == line.strip() for line in collapsed.split("\n"))
    assert normalize_whitespace(collapsed, "collapse") == collapsed


@given(text=WHITE_SPACE)
def test_collapsing_keeps_paragraphs_apart_and_lines_as_lines(text):
    paragraphs = [part for part in normalize_whitespace(text, "collapse").split("\n\n") if part]
    lines = [" ".join(line.split()) for line in text.strip().split("\n")]
    expected = "\n".join(lines)
    while "\n\n\n" in expected:
        expected = expected.replace("\n\n\n", "\n\n")
    assert paragraphs == [part for part in expected.split("\n\n") if part]


@given(text=WHITE_SPACE)
def test_strip_changes_only_the_ends_and_keep_changes_nothing(text):
    assert normalize_whitespace(text, "strip") == text.strip()
    assert normalize_whitespace(text, "keep") == text


def test_collapse_removes_the_indentation_of_code():
    assert normalize_whitespace("def f():\n    return  1\n", "collapse") == "def f():\nreturn 1"
