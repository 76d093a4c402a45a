"""Selection: drops kept conversations that are duplicates, or overlap with held-out text.

Both need a view of the whole dataset. Held-out splits take precedence: of two duplicates the one in
`test` stays, then the one in `validation`, then the earliest, so that no held-out text is trained
on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from workflow_scripts.chats import contamination, duplicates, shingles
from workflow_scripts.chats.cleaning import CleanedChunk, Shard
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.parallel import map_in_order
from workflow_scripts.settings import DecontaminationSettings, NearDuplicateSettings

KEPT = 0
EXACT_DUPLICATE, NEAR_DUPLICATE, CONTAMINATED = 1, 2, 3
REASONS = {
    EXACT_DUPLICATE: "duplicate",
    NEAR_DUPLICATE: "near duplicate",
    CONTAMINATED: "overlaps with held-out text",
}
PRECEDENCE = ("test", "validation", "train")
TRAIN = SPLITS.index("train")


class Selection:
    """The kept conversations of all chunks in the order they were read, and which are dropped.

    Args:
        chunks: summaries of the cleaned chunks, in order.
    """

    def __init__(self, chunks: Sequence[CleanedChunk]) -> None:
        self.starts = np.cumsum([0, *(len(chunk.splits) for chunk in chunks)])
        """(chunks + 1,) index of each chunk's first conversation; the last is their number."""
        n = int(self.starts[-1])
        self.splits = np.concatenate([chunk.splits for chunk in chunks])
        self.reasons = np.full(n, KEPT, dtype=np.uint8)
        """(conversations,) KEPT or a key of REASONS."""
        self.twins = np.full(n, -1, dtype=np.int64)
        """(conversations,) for a duplicate, the conversation that stays; otherwise −1."""
        self.shares = np.zeros(n, dtype=np.float32)
        """(conversations,) similarity to the twin, or overlap with held-out text."""
        self._chunks = chunks
        precedence = np.array([PRECEDENCE.index(split) for split in SPLITS])[self.splits]
        order = np.argsort(precedence, kind="stable")
        self._rank = np.empty(n, dtype=np.int64)
        self._rank[order] = np.arange(n)

    def place(self, index: int) -> str:
        """Return `file:line` of a conversation."""
        number = self._shard_of(index)
        chunk = self._chunks[number]
        return f"{chunk.source_file}:{chunk.source_lines[index - self.starts[number]]}"

    def detail(self, index: int) -> str:
        """Return the detail that goes with a dropped conversation's reason."""
        if self.reasons[index] == CONTAMINATED:
            return f"{self.shares[index]:.0%} of its n-grams, or of the held-out text's"
        place = self.place(self.twins[index])
        if self.reasons[index] == NEAR_DUPLICATE:
            return f"{self.shares[index]:.0%} of {place}"
        return f"of {place}"

    def drop_exact_duplicates(self) -> None:
        """Keep one of each set of conversations that differ only in case and white space."""
        digests = np.concatenate([chunk.digests for chunk in self._chunks])
        twins = duplicates.first_of_equal(digests, self._rank)
        is_dropped = twins >= 0
        self.twins[is_dropped] = twins[is_dropped]
        self.reasons[is_dropped] = EXACT_DUPLICATE

    def drop_near_duplicates(self, settings: NearDuplicateSettings) -> None:
        """Keep one of each set of conversations with similar word shingles."""
        left = np.flatnonzero(self.reasons == KEPT)
        band_keys = np.concatenate([chunk.band_keys for chunk in self._chunks])[left]

        @functools.lru_cache(maxsize=4096)
        def shingle_set(at: int) -> np.ndarray:
            return np.unique(shingles.ngram_hashes(self._words(left[at]), settings.shingle_words))

        twins, similarities = duplicates.near_duplicates(
            band_keys,
            self._rank[left],
            lambda one, other: duplicates.jaccard(shingle_set(one), shingle_set(other)),
            settings.threshold,
        )
        is_dropped = twins >= 0
        dropped = left[is_dropped]
        self.twins[dropped] = left[twins[is_dropped]]
        self.shares[dropped] = similarities[is_dropped]
        self.reasons[dropped] = NEAR_DUPLICATE

    def drop_contaminated(
        self,
        settings: DecontaminationSettings,
        *,
        evaluation_texts: Iterable[str],
        scratch: Path,
        n_processes: int,
    ) -> None:
        """Drop training conversations that overlap with held-out text.

        Args:
            evaluation_texts: texts of the user's evaluation files, held out like the splits.
            scratch: folder for the index, which every process maps.
        """
        n = settings.ngram_words
        words = itertools.chain(map(shingles.word_hashes, evaluation_texts), self._held_out_words())
        index = contamination.NgramIndex.build(shingles.ngram_hashes(one, n) for one in words)
        index.save(scratch)
        del index  # each process maps the saved one
        shares = map_in_order(
            _overlaps,
            [(chunk.shard, chunk.word_offsets, n) for chunk in self._chunks],
            n_processes=n_processes,
            initializer=_load_index,
            initial_arguments=(scratch,),
        )
        shares = np.concatenate(list(shares))
        in_training = (self.reasons == KEPT) & (self.splits == TRAIN)
        is_dropped = in_training & (shares >= settings.threshold)
        self.shares[is_dropped] = shares[is_dropped]
        self.reasons[is_dropped] = CONTAMINATED

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _words(self, index: int) -> np.ndarray:
        """Return the word hashes of one conversation.

        They are read, not mapped: mapped pages stay in memory, and a million chats have 4 GB.
        """
        number = self._shard_of(index)
        chunk = self._chunks[number]
        start, end = chunk.word_offsets[index - self.starts[number] :][:2]
        return np.fromfile(chunk.shard.words, np.uint64, int(end - start), offset=8 * int(start))

    def _held_out_words(self) -> Iterator[np.ndarray]:
        """Yield the word hashes of each kept conversation of a held-out split."""
        is_held_out = (self.reasons == KEPT) & (self.splits != TRAIN)
        for chunk, start in zip(self._chunks, self.starts, strict=False):
            rows = np.flatnonzero(is_held_out[start : start + len(chunk.splits)])
            if len(rows):
                words = np.fromfile(chunk.shard.words, np.uint64)
                for row in rows:
                    yield words[slice(*chunk.word_offsets[row : row + 2])]


_index: contamination.NgramIndex


def _load_index(scratch: Path) -> None:
    global _index
    _index = contamination.NgramIndex.load(scratch)


def _overlaps(question: tuple[Shard, np.ndarray, int]) -> np.ndarray:
    """Return the overlap of a shard's conversations with held-out text: (conversations,) float64.

    Args:
        question: the shard, where the words of each conversation begin, and n of the n-grams.
    """
    shard, offsets, n = question
    words = np.fromfile(shard.words, np.uint64)
    return _index.overlaps(*shingles.ngram_hashes_by_row(words, offsets, n))
