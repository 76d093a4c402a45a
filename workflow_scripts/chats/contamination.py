"""Contamination: how much of a training conversation is held-out text, or of that is in it.

A model that has seen what it is measured on is measured on its memory. As in GPT-3 (Brown et al.,
arXiv:2005.14165, appendix C), n-grams of 13 words are looked up among those of held-out
conversations, and one that occurs in more than 10 of them is left out: it is boilerplate, and
identifies no conversation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files

if TYPE_CHECKING:
    import numpy as np

MOST_CONVERSATIONS = 10
"""Held-out conversations an n-gram may occur in."""
# Building sorts a sixteenth of the hashes at a time: sorting takes three times their memory.
RANGE_BITS = 4
BITS_PER_NGRAM = 16
SMALLEST_BITMAP = 16  # as a power of two, bits
# With 16 to 32 bits an n-gram, at two places each, 1 in 75 or fewer absent ones must be searched
# for; a search among 45 million costs 26 cache misses.
N_PLACES = 2


@dataclass(frozen=True)
class NgramIndex:
    """The n-grams of held-out conversations, by hash. Written once, then mapped by every process.

    A bitmap answers for most hashes that are not there; the rest are searched for.
    """

    hashes: np.ndarray
    """(occurrences,) uint64, ascending: an n-gram once for each entry that has it."""
    entries: np.ndarray
    """(occurrences,) uint32: that entry."""
    n_ngrams: np.ndarray
    """(entries,) uint32: distinct n-grams of each, boilerplate included."""
    bitmap: np.ndarray
    """uint8; a power of two of bits."""

    @classmethod
    def build(cls, conversations: Iterable[np.ndarray]) -> NgramIndex:
        """An index of the held-out conversations' n-gram hashes.

        Args:
            conversations: `ngram_hashes` of each; entry i is the i-th of them.
        """
        import numpy as np

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
        import numpy as np

        for name in FIELDS:
            with files.atomic_file(folder / f"{name}.npy") as temporary:
                np.save(temporary, getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> NgramIndex:
        """The index mapped into memory, which processes share."""
        import numpy as np

        # As plain arrays: indexing np.memmap costs a microsecond a call more.
        return cls(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in FIELDS))

    def overlaps(self, ngrams: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """For each conversation the larger of two shares: of its n-grams, repeats counted, those
        that held-out text has; and of one held-out entry's distinct n-grams, those that it has.

        The second finds a short question of a benchmark within a long conversation.

        Args:
            ngrams: uint64, of all conversations, one after the other.
            offsets: (conversations + 1,) where each one's begin.
        Returns:
            (conversations,) float64.
        """
        import numpy as np

        n_conversations = len(offsets) - 1
        asked = self._maybe_known(ngrams)
        starts = np.searchsorted(self.hashes, ngrams[asked])
        counts = np.searchsorted(self.hashes, ngrams[asked], side="right") - starts
        is_found = counts > 0
        asked, starts, counts = asked[is_found], starts[is_found], counts[is_found]
        rows = np.searchsorted(offsets, asked, side="right") - 1
        n_found = np.bincount(rows, minlength=n_conversations)
        shares = n_found / np.maximum(np.diff(offsets), 1)
        # What a conversation has of an entry counts once, however often it says it.
        _, once = np.unique(rows * len(self.hashes) + starts, return_index=True)
        rows, starts, counts = rows[once], starts[once], counts[once]
        # Every entry of every n-gram found: a run of counts[i] positions from starts[i].
        runs = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        n_entries = len(self.n_ngrams)
        pairs, n_shared = np.unique(
            np.repeat(rows, counts) * n_entries + self.entries[runs], return_counts=True
        )
        rows, entries = np.divmod(pairs, max(n_entries, 1))
        np.maximum.at(shares, rows, n_shared / self.n_ngrams[entries])
        return shares

    def _maybe_known(self, ngrams: np.ndarray) -> np.ndarray:
        """Positions of the n-grams, without most of those that no entry has."""
        import numpy as np

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
    """The hashes from `low` to `high`, ascending, that stand in few enough entries, and these.

    Args:
        hashes: of all entries, one after the other, each once in an entry.
        ends: where each entry's hashes end.
    """
    import numpy as np

    positions = np.flatnonzero((hashes >= low) & (hashes <= high))
    entries = np.searchsorted(ends, positions, side="right").astype(np.uint32)
    order = np.argsort(hashes[positions], kind="stable")  # within a hash, entries ascend as before
    found, entries = hashes[positions][order], entries[order]
    _, inverse, n_entries = np.unique(found, return_inverse=True, return_counts=True)
    is_rare = n_entries[inverse] <= MOST_CONVERSATIONS
    return found[is_rare], entries[is_rare]


def _bitmap(hashes: np.ndarray) -> np.ndarray:
    """A Bloom filter of the hashes (Bloom, 1970): for each, the bits at its places are set."""
    import numpy as np

    n_bits = max(SMALLEST_BITMAP, (BITS_PER_NGRAM * len(hashes) - 1).bit_length())
    bitmap = np.zeros(1 << (n_bits - 3), np.uint8)
    for part in np.array_split(hashes, 1 << RANGE_BITS):
        for choice in range(N_PLACES):
            places = _place(part, choice, bitmap)
            np.bitwise_or.at(bitmap, places >> 3, np.uint8(1) << _bit(places))
    return bitmap


def _place(hashes: np.ndarray, choice: int, bitmap: np.ndarray) -> np.ndarray:
    """Which bit of the bitmap is a hash's, by its first bits or by its last ones."""
    n_bits = 8 * len(bitmap)  # a power of two
    if choice == 0:
        return hashes >> (64 - (n_bits.bit_length() - 1))
    return hashes & (n_bits - 1)


def _bit(places: np.ndarray) -> np.ndarray:
    """Which bit of its byte a place is."""
    import numpy as np

    return places.astype(np.uint8) & 7
