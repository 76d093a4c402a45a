"""Shingles: n-grams of the words of a conversation, as 64-bit hashes.

Unlike Python's own `hash`, the hashes are the same in every process and on every machine, so that
they drop the same conversations everywhere. Two different words share a hash about once in 2⁶⁴
pairs; they then count as equal.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np

from workflow_scripts.chats.messages import Message

# Letters, marks (the vowels of Hindi) and numbers; all else separates words.
WORD_CATEGORIES = "LMN"
# Scripts written without spaces, by the beginning of their characters' Unicode names. Each of their
# characters counts as a word. Otherwise a sentence would be one word, and two sentences that differ
# slightly would have nothing in common.
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
# Base of the polynomials below: odd, so that it has an inverse modulo 2⁶⁴. Knuth's, for MMIX.
MULTIPLIER = 6364136223846793005


def spaced(text: str) -> str:
    """Return a text's words separated by spaces: case folded, without punctuation and symbols.

    Each character of the UNSPACED_SCRIPTS is a word.
    """
    return text.casefold().translate(_SEPARATED)


def comparable_text(messages: Sequence[Message]) -> str:
    """Return the text of a conversation that is compared: all messages except system messages.

    A whole dataset often shares one system prompt, which would make all conversations similar.
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
    """Return one hash per word, in order: (words,) uint64."""
    return word_hashes_by_row([text])[0]


def word_hashes_by_row(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return `word_hashes` of many texts, computed on all their bytes at once.

    A word's hash is the polynomial of its UTF-8 bytes modulo 2⁶⁴, mixed. That takes a fifth of the
    time of a dict lookup per word, and needs no vocabulary. The cost: about 40 times the memory of
    the texts while it runs.

    Returns:
        hashes: uint64 hashes of all texts, one after the other.
        offsets: (texts + 1,) int64, where the words of each text begin.
    """
    # surrogatepass, because rejecting a lone surrogate is not this module's task.
    encoded = [spaced(text).encode("utf-8", "surrogatepass") for text in texts]
    text_starts = np.cumsum([0, *(len(text) + 1 for text in encoded)])
    characters = np.frombuffer(b" ".join([*encoded, b""]), np.uint8)  # a space ends each text
    is_in_word = characters != ord(" ")
    bounds = np.flatnonzero(np.diff(is_in_word, prepend=False))
    starts, ends = bounds[::2], bounds[1::2]
    offsets = np.searchsorted(starts, text_starts)
    if not len(starts):
        return np.empty(0, np.uint64), offsets
    lengths = ends - starts
    powers = np.cumprod(np.full(lengths.max(), MULTIPLIER, np.uint64))
    firsts = np.cumsum(lengths) - lengths  # where each word begins, without the spaces
    places = np.arange(firsts[-1] + lengths[-1]) - np.repeat(firsts, lengths)
    terms = powers[places]
    # The + 1 tells "a" from "a\0".
    terms *= characters[is_in_word].astype(np.uint64) + 1
    return mixed(np.add.reduceat(terms, firsts)), offsets


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return one hash per run of `n` words, in order, repeats included.

    A text of fewer words has one hash, of all its words; an empty text has none.

    Args:
        hashes: (words,) uint64, from `word_hashes`.
    Returns:
        (words − n + 1,) uint64, evenly spread over all 64 bits.
    """
    if n < 1:
        raise ValueError(f"n: found {n}, expected at least 1")
    n = min(n, len(hashes))
    if n == 0:
        return np.empty(0, np.uint64)
    # Σ word[i + j] · m^j for each i, modulo 2⁶⁴, from one running sum for any n. The factor m^i can
    # be divided out, because m is odd and has an inverse.
    powers, inverse_powers = _powers(1 << len(hashes).bit_length())
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * powers[: len(hashes)], out=sums[1:])
    polynomials = sums[n:] - sums[:-n]
    polynomials *= inverse_powers[: len(polynomials)]
    return mixed(polynomials)


@functools.lru_cache(maxsize=32)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    factors = np.full((2, count), 1, np.uint64)
    factors[0, 1:] = MULTIPLIER
    factors[1, 1:] = pow(MULTIPLIER, -1, 1 << 64)
    powers, inverse_powers = np.cumprod(factors, axis=1)
    return powers, inverse_powers


def ngram_hashes_by_row(
    hashes: np.ndarray, offsets: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `ngram_hashes` of many texts, computed in one pass.

    Args:
        hashes: (words,) uint64 word hashes of all texts, one after the other.
        offsets: (texts + 1,) int64, where the words of each text begin.
    Returns:
        hashes: uint64 n-gram hashes of all texts, one after the other.
        offsets: (texts + 1,) int64, where the n-grams of each text begin.
    """
    n_words = np.diff(offsets)
    n_ngrams = np.where(n_words >= n, n_words - n + 1, np.minimum(n_words, 1))
    ngram_offsets = np.concatenate([[0], np.cumsum(n_ngrams)])
    # The word at which each n-gram starts; runs that reach into the next text are skipped.
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
    """Permute the 64-bit numbers so that every bit depends on all bits; in place.

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
    """For `str.translate`: keeps the characters of words and replaces all others by a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] not in WORD_CATEGORIES:
            separated = " "
        elif unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS):
            separated = f" {character} "
        else:
            separated = character
        self[code] = separated
        return separated


_SEPARATED = _SeparatedCharacters()
