"""Shingles: the words of a conversation, and their n-grams, as 64-bit hashes to compare by.

The hashes are the same in every process and on every machine, which Python's own `hash` is not:
what is dropped must not depend on who computed it. Two different words share a hash about once in
2⁶⁴ pairs; nothing here tells them apart then.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workflow_scripts.chats.messages import Message

if TYPE_CHECKING:
    import numpy as np

# Letters, marks (the vowels of Hindi), numbers; the rest stands between words.
WORD_CATEGORIES = "LMN"
# Scripts written without spaces, by the beginning of their characters' Unicode names. There a
# character is a word: a whole sentence would be one otherwise, and a changed one share nothing.
UNSPACED_SCRIPTS = (
    "CJK ",
    "HIRAGANA ",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
)
# Of the polynomials below: odd, so that it has an inverse modulo 2⁶⁴; Knuth's, of MMIX.
MULTIPLIER = 6364136223846793005


def words(text: str) -> list[str]:
    """The words of a text: case folded, punctuation and symbols left out.

    Characters of the UNSPACED_SCRIPTS are words of their own.
    """
    return _spaced(text).split()


def _spaced(text: str) -> str:
    """A text with its words apart by spaces, and nothing else between them."""
    return text.casefold().translate(_SEPARATED)


def comparable_text(messages: Sequence[Message]) -> str:
    """What of a conversation is compared: all it says, and what it calls, but no system message.

    A system prompt is often shared by a whole dataset, and would make everything alike.
    """
    parts = []
    for message in messages:
        if message["role"] == "system":
            continue
        parts.append(message.get("content") or "")
        for call in message.get("tool_calls") or ():
            parts += (call["function"]["name"], call["function"]["arguments"])
    return "\n".join(parts)


def word_hashes(text: str) -> np.ndarray:
    """(words,) uint64: a hash a word, in the text's order."""
    return word_hashes_by_row([text])[0]


def word_hashes_by_row(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`word_hashes` of many texts, computed on all their bytes at once.

    A word's hash is its UTF-8 bytes as a polynomial modulo 2⁶⁴, mixed: a fifth of the time that
    looking each word up in a dict takes, and no vocabulary to hold. Takes some 40 times the memory
    of the texts meanwhile.

    Returns:
        hashes: uint64, of all texts, one after the other.
        offsets: (texts + 1,) int64, where each text's words begin.
    """
    import numpy as np

    # surrogatepass: a lone surrogate is not this module's to reject.
    spaced = [_spaced(text).encode("utf-8", "surrogatepass") for text in texts]
    text_starts = np.cumsum([0, *(len(text) + 1 for text in spaced)])
    characters = np.frombuffer(b" ".join([*spaced, b""]), np.uint8)  # a space ends each text
    is_in_word = characters != ord(" ")
    bounds = np.flatnonzero(np.diff(is_in_word, prepend=False))
    starts, ends = bounds[::2], bounds[1::2]
    offsets = np.searchsorted(starts, text_starts)
    if not len(starts):
        return np.empty(0, np.uint64), offsets
    lengths = ends - starts
    powers = np.cumprod(np.full(lengths.max(), MULTIPLIER, np.uint64))
    firsts = np.cumsum(lengths) - lengths  # of each word, among the characters of words
    places = np.arange(firsts[-1] + lengths[-1]) - np.repeat(firsts, lengths)
    terms = powers[places]
    # No byte is 0, so that "a" and "a\0" differ; the spaces are left out.
    terms *= characters[is_in_word].astype(np.uint64) + 1
    return mixed(np.add.reduceat(terms, firsts)), offsets


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash for each run of `n` words, in the text's order, repeats included.

    A text of fewer words gives one hash, of all of them; a text of none gives none.

    Args:
        hashes: (words,) uint64, of `word_hashes`.
    Returns:
        (words − n + 1,) uint64, evenly spread over all 64 bits.
    """
    import numpy as np

    if n < 1:
        raise ValueError(f"n: found {n}, expected at least 1")
    n = min(n, len(hashes))
    if n == 0:
        return np.empty(0, np.uint64)
    # Σ word[i + j] · m^j for each i, modulo 2⁶⁴, from one running sum whatever n is: an odd m has
    # an inverse, so the sum's m^i can be divided away.
    powers, inverse_powers = _powers(1 << len(hashes).bit_length())
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * powers[: len(hashes)], out=sums[1:])
    polynomials = sums[n:] - sums[:-n]
    polynomials *= inverse_powers[: len(polynomials)]
    return mixed(polynomials)


@functools.lru_cache(maxsize=32)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    factors = np.full((2, count), 1, np.uint64)
    factors[0, 1:] = MULTIPLIER
    factors[1, 1:] = pow(MULTIPLIER, -1, 1 << 64)
    powers, inverse_powers = np.cumprod(factors, axis=1)
    return powers, inverse_powers


def ngram_hashes_by_row(
    hashes: np.ndarray, offsets: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """`ngram_hashes` of many texts in one pass: what each gives, one after the other.

    Args:
        hashes: (words,) uint64, of all texts.
        offsets: (texts + 1,) int64, where each text's words begin.
    Returns:
        hashes: uint64, of all texts.
        offsets: (texts + 1,) int64, where each text's begin.
    """
    import numpy as np

    n_words = np.diff(offsets)
    n_ngrams = np.where(n_words >= n, n_words - n + 1, np.minimum(n_words, 1))
    ngram_offsets = np.concatenate([[0], np.cumsum(n_ngrams)])
    # The word at which each n-gram starts; runs that reach into the next text are left out.
    starts = np.arange(ngram_offsets[-1]) + np.repeat(offsets[:-1] - ngram_offsets[:-1], n_ngrams)
    if len(hashes) < n:
        found = np.zeros(len(starts), np.uint64)
    else:
        found = ngram_hashes(hashes, n)[np.minimum(starts, len(hashes) - n)]
    for text in np.flatnonzero((n_words > 0) & (n_words < n)):
        own = hashes[offsets[text] : offsets[text + 1]]
        found[ngram_offsets[text]] = ngram_hashes(own, n)[0]
    return found, ngram_offsets


def mixed(hashes: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers after which every bit depends on all (in place).

    Source: splitmix64's finalizer; Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014.
    """
    hashes ^= hashes >> 30
    hashes *= 0xBF58476D1CE4E5B9
    hashes ^= hashes >> 27
    hashes *= 0x94D049BB133111EB
    hashes ^= hashes >> 31
    return hashes


class _SeparatedCharacters(dict[int, str]):
    """For `str.translate`: a character of a word as it is, all else as a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] not in WORD_CATEGORIES:
            separated = " "
        elif unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS):
            separated = f" {character} "
        else:
            separated = character
        self[code] = separated  # at most 1.1 million, and never met
        return separated


_SEPARATED = _SeparatedCharacters()
