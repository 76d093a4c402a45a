"""Text repair: undoes damage from transport, and leaves what a writer meant.

ftfy finds text that was decoded with the wrong encoding ("mojibake") and decodes it correctly. It
leaves text that may be intended. But it also repairs text *about* mojibake; a dataset of such text
needs `unicode: keep`.
"""

from __future__ import annotations

import io
import re
import unicodedata
from typing import Literal

import ftfy
from ftfy.badness import is_bad  # ftfy's own test before it looks for mojibake

# The ASCII characters that may need repair: controls except tab, line feed and form feed.
ASCII_CONTROLS = "".join(map(chr, (*range(9), 11, *range(13, 32), 127)))
CONTROL_BYTES = ASCII_CONTROLS.encode()
# The characters that may need repair in any text, apart from mojibake.
CONTROLS = re.compile(
    f"[{re.escape(ASCII_CONTROLS)}\x80-\x9f\u2028\u2029\u206a-\u206f\ufeff\ufff9-\ufffc]"
)
# Mojibake is two or more characters, or one of these four. This takes a tenth of the time of ftfy's
# own search.
MAYBE_MOJIBAKE = re.compile("[ÂÃŒœ]|[^\x00-\x7f]{2}")
# C1 controls without a character in Windows-1252; ftfy leaves them.
MEANINGLESS = dict.fromkeys((0x81, 0x8D, 0x8F, 0x90, 0x9D))
REPAIRS = ftfy.TextFixerConfig(
    # Mojibake: nobody writes "schÃ¶n".
    fix_encoding=True,
    # U+0080–U+009F display nothing; they are mislabelled quotes and dashes of Windows-1252.
    fix_c1_controls=True,
    # Bytes that control terminals and printers; a model that learned them would print them.
    remove_terminal_escapes=True,
    remove_control_chars=True,
    # \r\n, \r and U+2028 look like \n to a reader, but are other tokens.
    fix_line_breaks=True,
    # A letter written as one character or as two gives different tokens; one is the usual form.
    # NFKC would turn 10³ into 103.
    normalization="NFC",
    # A chat about HTML writes "&lt;", and that is not damage.
    unescape_html=False,
    # Quotes, ligatures and full-width forms are typography that the writer chose.
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    # This would replace a lone surrogate by U+FFFD, and so hide that a text was cut.
    fix_surrogates=False,
    explain=False,
)
"""What ftfy may do. The options that are absent tune `fix_encoding`; ftfy reads them only if it
explains its steps, so they must keep their defaults."""


def repair_unicode(text: str) -> str:
    """Return the text without mojibake, control characters and terminal escapes, in NFC.

    A second repair changes nothing. Lone surrogates stay: their text is lost, and the reader
    rejects them.
    """
    if _is_plain(text):
        return text
    # A repair can expose more damage, across the line breaks that it made.
    while (repaired := _repair_lines(text)) != text:
        text = repaired
    return text


def normalize_whitespace(text: str, policy: Literal["strip", "collapse", "keep"]) -> str:
    """Apply `datasets.<name>.cleaning.whitespace`.

    `collapse` turns a run of blanks, tabs included, into one space, removes blanks at the ends of
    lines, and turns several empty lines into one. It removes the indentation of code, so it is for
    prose.
    """
    if policy == "keep":
        return text
    if policy == "collapse":
        text = re.sub(r"[^\S\n]+", " ", text)
        text = re.sub(r" ?\n ?", "\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip()


def _is_plain(text: str) -> bool:
    """True if ftfy would certainly change nothing; ftfy itself takes 300 µs per kilobyte."""
    if text.isascii():
        ascii_bytes = text.encode()
        return len(ascii_bytes.translate(None, CONTROL_BYTES)) == len(ascii_bytes)
    if CONTROLS.search(text) or not unicodedata.is_normalized("NFC", text):
        return False
    return not MAYBE_MOJIBAKE.search(text) or not is_bad(text)


def _repair_lines(text: str) -> str:
    lines = io.StringIO(text, newline="\n")  # lines end only at \n, as in ftfy
    repaired = (line if _is_plain(line) else ftfy.fix_text(line, REPAIRS) for line in lines)
    return "".join(repaired).translate(MEANINGLESS)
