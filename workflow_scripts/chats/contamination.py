"""Contamination: the overlap of training conversations with held-out text.

A model that was trained on held-out text is measured on its memory. As in GPT-3 (Brown et al.,
arXiv:2005.14165, appendix C), n-grams of 13 words are looked up among those of held-out
conversations. An n-gram that occurs in more than 10 of them is ignored: it is boilerplate, and
identifies no conversation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workflow_scripts import files

MOST_CONVERSATIONS = 10
"""Held-out conversations that an n-gram may occur in."""
# The index is built from a sixteenth of the hashes at a time: sorting takes 3 times their memory.
RANGE_BITS = 4
BITS_PER_NGRAM = 16
SMALLEST_BITMAP = 16  # bits, as a power of two
# With 16 to 32 bits per n-gram and two places each, at most 1 in 75 absent n-grams is searched for;
# a search among 45 million costs 26 cache misses.
N_PLACES = 2


@dataclass(frozen=True)
class NgramIndex:
    """Hashes of the n-grams of held-out conversations; written once, then mapped by every process.

    A bitmap excludes most hashes that are absent; the others are searched for.
    """

    hashes: np.ndarray
    """(occurrences,) uint64, ascending: an n-gram once per entry that contains it."""
    entries: np.ndarray
    """(occurrences,) uint32: that entry."""
    n_ngrams: np.ndarray
    """(entries,) uint32: distinct n-grams of each entry, boilerplate included."""
    bitmap: np.ndarray
    """uint8; its number of bits is a power of two."""

    @classmethod
    def build(cls, conversations: Iterable[np.ndarray]) -> NgramIndex:
        """Build the index.

        Args:
            conversations: `ngram_hashes` of each held-out conversation; entry i is the i-th.
        """
        collected = [np.empty(0, np.uint64), *map(np.unique, conversations)]
        n_ngrams = np.array([len(ngrams) for ngrams in collected[1:]], np.uint32)
        ends = np.cumsum(n_ngrams, dtype=np.int64)
        hashes = np.concatenate(collected)
        del collected
        bounds = [number << (64 - RANGE_BITS) for number in range(1, 1 << RANGE_BITS)]
        parts = [
            _identifying(hashes, ends, low, high - 1)
            for low, high in zip([0, *bounds], [*bounds, 1 << 64], strict=True)
        ]
        del hashes
        ordered = np.concatenate([part[0] for part in parts])
        entries = np.concatenate([part[1] for part in parts])
        return cls(ordered, entries, n_ngrams, _bitmap(ordered))

    def save(self, folder: Path) -> None:
        for name in FIELDS:
            with files.atomic_file(folder / f"{name}.npy") as temporary:
                np.save(temporary, getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> NgramIndex:
        """Map a saved index into memory, which processes share."""
        # Plain arrays, because indexing np.memmap takes a microsecond longer per call.
        return cls(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in FIELDS))

    def overlaps(self, ngrams: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Return the overlap of each conversation: the larger of two shares.

        The first is the share of its n-grams, repeats counted, that held-out text contains. The
        second is the share of one held-out entry's distinct n-grams that it contains, which finds
        a short benchmark question in a long conversation.

        Args:
            ngrams: uint64 hashes of all conversations, one after the other.
            offsets: (conversations + 1,) where the hashes of each conversation begin.
        Returns:
            (conversations,) float64.
        """
        n_conversations = len(offsets) - 1
        asked = self._maybe_known(ngrams)
        starts = np.searchsorted(self.hashes, ngrams[asked])
        counts = np.searchsorted(self.hashes, ngrams[asked], side="right") - starts
        is_found = counts > 0
        asked, starts, counts = asked[is_found], starts[is_found], counts[is_found]
        rows = np.searchsorted(offsets, asked, side="right") - 1
        n_found = np.bincount(rows, minlength=n_conversations)
        shares = n_found / np.maximum(np.diff(offsets), 1)
        # An n-gram of an entry counts once, even if the conversation repeats it.
        _, once = np.unique(rows * len(self.hashes) + starts, return_index=True)
        rows, starts, counts = rows[once], starts[once], counts[once]
        # The entries of n-gram i are the counts[i] positions from starts[i].
        runs = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        n_entries = len(self.n_ngrams)
        pairs, n_shared = np.unique(
            np.repeat(rows, counts) * n_entries + self.entries[runs], return_counts=True
        )
        rows, entries = np.divmod(pairs, max(n_entries, 1))
        np.maximum.at(shares, rows, n_shared / self.n_ngrams[entries])
        return shares

    def _maybe_known(self, ngrams: np.ndarray) -> np.ndarray:
        """Return the positions of the n-grams, without most of those that are in no entry."""
        positions = np.arange(len(ngrams))
        for choice in range(N_PLACES):
            places = _place(ngrams[positions], choice, self.bitmap)
            bytes_there = self.bitmap.take((places >> 3).view(np.int64))
            positions = positions[(bytes_there >> _bit(places) & 1).view(bool)]
        return positions


FIELDS = tuple(field.name for field in dataclasses.fields(NgramIndex))


def _identifying(
    hashes: np.ndarray, ends: np.ndarray, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes from `low` to `high` without boilerplate, ascending, and their entries.

    Args:
        hashes: hashes of all entries, one after the other, each once per entry.
        ends: where each entry's hashes end.
    """
    positions = np.flatnonzero((hashes >= low) & (hashes <= high))
    entries = np.searchsorted(ends, positions, side="right").astype(np.uint32)
    order = np.argsort(hashes[positions], kind="stable")  # within a hash, entries ascend as before
    found, entries = hashes[positions][order], entries[order]
    _, inverse, n_entries = np.unique(found, return_inverse=True, return_counts=True)
    is_rare = n_entries[inverse] <= MOST_CONVERSATIONS
    return found[is_rare], entries[is_rare]


def _bitmap(hashes: np.ndarray) -> np.ndarray:
    """Return a Bloom filter of the hashes (Bloom, 1970): the bits at their places are set."""
    n_bits = max(SMALLEST_BITMAP, (BITS_PER_NGRAM * len(hashes) - 1).bit_length())
    bitmap = np.zeros(1 << (n_bits - 3), np.uint8)
    for part in np.array_split(hashes, 1 << RANGE_BITS):
        for choice in range(N_PLACES):
            places = _place(part, choice, bitmap)
            np.bitwise_or.at(bitmap, places >> 3, np.uint8(1) << _bit(places))
    return bitmap


def _place(hashes: np.ndarray, choice: int, bitmap: np.ndarray) -> np.ndarray:
    """Return the bit of the bitmap that a hash's first bits (choice 0) or last bits choose."""
    n_bits = 8 * len(bitmap)  # a power of two
    if choice == 0:
        return hashes >> (64 - (n_bits.bit_length() - 1))
    return hashes & (n_bits - 1)


def _bit(places: np.ndarray) -> np.ndarray:
    """Return the index of a place within its byte."""
    return places.astype(np.uint8) & 7
