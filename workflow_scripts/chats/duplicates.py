"""Duplicates: which conversations say the same as another one, or almost the same.

Equal ones are found by a digest of what they say. Near ones are found by MinHash: two signatures
agree in a slot with a probability that is the Jaccard similarity of the shingle sets (Broder, "On
the resemblance and containment of documents", 1997). Slots are grouped in bands, and two
conversations that agree in a whole band are compared (locality-sensitive hashing; Indyk and
Motwani, 1998; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", §3.4). The comparison is
exact, and with one that is kept: nothing is dropped by an estimate, nor by a chain of likenesses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from workflow_scripts.chats.messages import Message
from workflow_scripts.chats.shingles import mixed

if TYPE_CHECKING:
    import numpy as np

N_PERMUTATIONS = 128
MINHASH_SEED = 42
BETWEEN_PARTS = " \ud800 "
# Share of the pairs at the threshold that must be found; more alike pairs are found more often.
RECALL = 0.99
# A key that means no key: a conversation without a word is like no other.
NO_KEY = 0
# Kept conversations of one band's bucket that a newcomer is compared with. Copies fill a bucket
# with one kept conversation; many kept ones mean a text that a dataset repeats around different
# content, and comparing them all would take time square in their number. Such a pair is still
# found by the bands in which the content shows.
MOST_COMPARED = 16


def normalized_digest(messages: Sequence[Message], tools: str | None) -> bytes:
    """16 bytes, equal where conversations say the same, but for case and white space.

    Roles, tool calls and the tools on offer count. Ids of calls do not, they are random; nor does
    which answers are trained on.
    """
    parts = [tools or ""]
    for message in messages:
        parts += (message["role"], message.get("content") or "")
        for call in message.get("tool_calls") or ():
            parts += ("call", call["function"]["name"], call["function"]["arguments"])
    # Half a surrogate pair stands between the parts, as no text may hold one.
    text = " ".join(BETWEEN_PARTS.join(parts).casefold().split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def first_of_equal(digests: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """For each conversation, the one of lowest rank with the same digest.

    Args:
        digests: (conversations, 2) uint64, of `normalized_digest`.
        rank: (conversations,) integers, each once; the lower is kept.
    Returns:
        (conversations,) int64; −1 where it is the first itself.
    """
    import numpy as np

    order = np.lexsort((rank, digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first_of = order[is_first][np.cumsum(is_first) - 1]
    twins = np.full(len(order), -1, np.int64)
    twins[order[~is_first]] = first_of[~is_first]
    return twins


def choose_bands(threshold: float) -> tuple[int, int]:
    """How many bands, and slots a band, so that a pair at the threshold is found.

    A pair of similarity s agrees in one band of r slots with probability sʳ, and is found with
    1 − (1 − sʳ)ᵇ. The longest band that finds RECALL of the pairs has the fewest to compare:

        threshold                 0.5    0.6    0.7    0.8    0.9    1
        bands × slots             42×3   42×3   32×4   21×6   12×10  1×128
        found at the threshold    0.996  1.000  1.000  0.998  0.994  1
        found 0.1 below it        0.938  0.996  0.988  0.928  0.744  0.000
    """
    for n_slots in range(N_PERMUTATIONS, 1, -1):
        n_bands = N_PERMUTATIONS // n_slots
        if 1 - (1 - threshold**n_slots) ** n_bands >= RECALL:
            return n_bands, n_slots
    return N_PERMUTATIONS, 1


def band_keys(shingles: np.ndarray, offsets: np.ndarray, *, threshold: float) -> np.ndarray:
    """A key a conversation and band; conversations that agree in a band are worth comparing.

    Args:
        shingles: uint64 hashes of all conversations, one after the other; repeats and order within
            a conversation do not matter.
        offsets: (conversations + 1,) where each conversation's begin.
    Returns:
        (conversations, bands) uint64; NO_KEY where a conversation has no shingle.
    """
    import numpy as np
    from rensa import RMinHash

    n_bands, n_slots = choose_bands(threshold)
    n_conversations = len(offsets) - 1
    if n_conversations == 0:
        return np.empty((0, n_bands), np.uint64)
    # Full-set MinHash. Rensa's faster `rho` samples shingles by their order, so a shifted copy
    # is another text to it.
    signatures = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, np.asarray(offsets, np.uint64), N_PERMUTATIONS, MINHASH_SEED
    )
    slots = np.array(signatures.to_rows(), np.uint64)[:, : n_bands * n_slots]
    slots = slots.reshape(n_conversations, n_bands, n_slots)
    keys = np.zeros((n_conversations, n_bands), np.uint64)
    for slot in range(n_slots):
        # Mixed at every step: slots are 32 bits wide, and a plain polynomial of them collides.
        keys = mixed(keys ^ slots[:, :, slot])
        keys += 0x9E3779B97F4A7C15
    keys[keys == NO_KEY] = 1
    keys[np.diff(np.asarray(offsets, np.int64)) == 0] = NO_KEY
    return keys


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Shared shingles as a share of all; both are sorted, without repeats (`np.unique`)."""
    import numpy as np

    n_shared = len(np.intersect1d(first, second, assume_unique=True))
    n_all = len(first) + len(second) - n_shared
    return n_shared / n_all if n_all else 0.0


def near_duplicates(
    keys: np.ndarray,
    rank: np.ndarray,
    similarity: Callable[[int, int], float],
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Which conversations are almost one that is kept.

    In the order of their rank, each is compared with those kept so far that share a band, the most
    bands first, and dropped where one is similar enough.

    Args:
        keys: (conversations, bands) uint64, of `band_keys`.
        rank: (conversations,) integers, each once; the lower is kept.
        similarity: of two conversations, by index: the exact one, of their shingle sets. Asked of
            a newcomer and, one after the other, the kept ones it may be like.
        threshold: similarity from which the later one is dropped.
    Returns:
        duplicate_of: (conversations,) int64, the kept one; −1 where it is kept itself.
        similarity: (conversations,) float32, to that one; 0 where it is kept.
    """
    import numpy as np

    duplicate_of = np.full(len(keys), -1, np.int64)
    similarities = np.zeros(len(keys), np.float32)
    colliding = _colliding(keys, rank)
    buckets = _Buckets(keys, colliding)
    for place, newcomer in enumerate(colliding.tolist()):
        for other in buckets.kept_beside(place):
            found = similarity(newcomer, other)
            if found >= threshold:
                duplicate_of[newcomer], similarities[newcomer] = other, found
                break
        else:
            buckets.keep(place)
    return duplicate_of, similarities


def _colliding(keys: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The conversations that share a key with another, by rank; most share none."""
    import numpy as np

    collides = np.zeros(len(keys), dtype=bool)
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band])
        ordered = keys[order, band]
        equals_next = (ordered[1:] == ordered[:-1]) & (ordered[1:] != NO_KEY)
        collides[order[1:][equals_next]] = True
        collides[order[:-1][equals_next]] = True
    colliding = np.flatnonzero(collides)
    return colliding[np.argsort(rank[colliding])]


class _Buckets:
    """For each band and key, the first kept conversations that have it.

    A band's buckets lie one after the other in an array, each as long as its conversations are
    many, so memory is known beforehand: 16 bytes a conversation and band, and no Python object.
    """

    def __init__(self, keys: np.ndarray, colliding: np.ndarray) -> None:
        import numpy as np

        n_colliding, n_bands = len(colliding), keys.shape[1]
        self._colliding = colliding
        self._start = np.empty((n_colliding, n_bands), np.int64)
        """Of each conversation's bucket in each band."""
        self._members = np.empty(n_colliding * n_bands, np.int32)
        """Places in `colliding`."""
        self._n_members = np.zeros(n_colliding * n_bands, np.int32)
        """By the bucket's start."""
        for band in range(n_bands):
            own = keys[colliding, band]
            order = np.argsort(own)
            ordered = own[order]
            begins = np.ones(n_colliding, dtype=bool)
            begins[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] == NO_KEY)
            starts = np.flatnonzero(begins)
            self._start[order, band] = band * n_colliding + starts[np.cumsum(begins) - 1]

    def kept_beside(self, place: int) -> list[int]:
        """The kept conversations to compare with: most shared bands first, then lowest rank."""
        import numpy as np

        starts = self._start[place]
        counts = self._n_members[starts]
        filled = counts > 0
        if not filled.any():
            return []
        ranges = zip(starts[filled].tolist(), counts[filled].tolist(), strict=True)
        beside = np.concatenate([self._members[start : start + n] for start, n in ranges])
        places, n_shared = np.unique(beside, return_counts=True)
        return self._colliding[places[np.argsort(-n_shared, kind="stable")]].tolist()

    def keep(self, place: int) -> None:
        """Add a conversation to its buckets, where they are not full."""
        starts = self._start[place]
        starts = starts[self._n_members[starts] < MOST_COMPARED]
        self._members[starts + self._n_members[starts]] = place
        self._n_members[starts] += 1
