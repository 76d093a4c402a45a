"""Text repair: undo damage that transport did to a text, and nothing a writer meant.

ftfy finds text that was decoded with the wrong encoding ("mojibake") and undoes it; it leaves what
might be meant. What it cannot know is a text *about* mojibake: that is repaired too, and a dataset
of such texts wants `unicode: keep`.
"""

from __future__ import annotations

import functools
import io
import re
import unicodedata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

# What in ASCII may want repair: all control characters but tab, line feed and form feed.
ASCII_CONTROLS = "".join(map(chr, (*range(9), 11, *range(13, 32), 127)))
CONTROL_BYTES = ASCII_CONTROLS.encode()
# What may want repair in any text, mojibake apart.
CONTROLS = re.compile(
    f"[{re.escape(ASCII_CONTROLS)}\x80-\x9f\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc]"
)
# Mojibake is two characters or more, but for what ftfy suspects in one of these four; a tenth of
# the time of its own search.
MAYBE_MOJIBAKE = re.compile("[ÂÃŒœ]|[^\x00-\x7f]{2}")
# The C1 controls that Windows-1252 has no character for, which ftfy leaves.
MEANINGLESS = dict.fromkeys((0x81, 0x8D, 0x8F, 0x90, 0x9D))
BLANKS = re.compile(r"[^\S\n]+")
BLANK_AROUND_BREAK = re.compile(r" ?\n ?")
EMPTY_LINES = re.compile(r"\n{3,}")


def repair_unicode(text: str) -> str:
    """The text without mojibake, control characters and terminal escapes, in NFC.

    A repaired text is left alone by a second repair. Lone surrogates stay as they are: their text
    is lost, and the reader rejects them.
    """
    if _is_plain(text):
        return text
    # One repair can uncover another, across the line breaks it made.
    while (repaired := _repair_lines(text)) != text:
        text = repaired
    return text


def mend_whitespace(text: str, policy: Literal["strip", "collapse", "keep"]) -> str:
    """White space as `datasets.<name>.cleaning.whitespace` has it.

    `collapse` makes one space of any run of blanks, tabs included, none at the ends of a line, and
    one empty line of several. Code loses its indentation by that, and Python its meaning: it is
    for prose.
    """
    if policy == "keep":
        return text
    if policy == "collapse":
        text = BLANKS.sub(" ", text)
        text = BLANK_AROUND_BREAK.sub("\n", text)
        text = EMPTY_LINES.sub("\n\n", text)
    return text.strip()


def _is_plain(text: str) -> bool:
    """Whether ftfy would change nothing, for certain: it needs 300 µs a kilobyte to say so."""
    from ftfy.badness import is_bad  # what ftfy itself asks before it looks for mojibake

    if text.isascii():
        ascii_bytes = text.encode()
        return len(ascii_bytes.translate(None, CONTROL_BYTES)) == len(ascii_bytes)
    if CONTROLS.search(text) or not unicodedata.is_normalized("NFC", text):
        return False
    return not MAYBE_MOJIBAKE.search(text) or not is_bad(text)


def _repair_lines(text: str) -> str:
    import ftfy

    config = _repairs()
    lines = io.StringIO(text, newline="\n")  # ends lines at \n alone, as ftfy does
    repaired = (line if _is_plain(line) else ftfy.fix_text(line, config) for line in lines)
    return "".join(repaired).translate(MEANINGLESS)


@functools.cache
def _repairs() -> TextFixerConfig:
    """What ftfy may do, option by option; those that are absent tune `fix_encoding`.

    ftfy reads them only where it explains its steps, so they have to be its defaults.
    """
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        # Mojibake: "schÃ¶n" is nobody's spelling.
        fix_encoding=True,
        # U+0080–U+009F display nothing; they are Windows-1252 quotes and dashes, mislabelled.
        fix_c1_controls=True,
        # Bytes that steer terminals and printers; a model that learned them would print them.
        remove_terminal_escapes=True,
        remove_control_chars=True,
        # \r\n, \r and U+2028 are \n to a reader, and other tokens to a model.
        fix_line_breaks=True,
        # The same letter as one character or two is two tokenizations; the composed one is common.
        # NFKC would turn 10³ into 103.
        normalization="NFC",
        # "&lt;" is what a chat about HTML says, and it is not damage.
        unescape_html=False,
        # Quotes, ligatures and full-width forms are typography, which the writer chose.
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        # Would put U+FFFD in a lone one's place and so hide that a text was cut.
        fix_surrogates=False,
        explain=False,
    )
