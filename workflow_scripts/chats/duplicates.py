"""Duplicates: conversations whose content equals that of another one, or almost equals it.

Equal conversations are found by a digest of their content. Near duplicates are found by MinHash:
two signatures agree in a slot with a probability equal to the Jaccard similarity of the shingle
sets (Broder, "On the resemblance and containment of documents", 1997). Slots are grouped in bands,
and two conversations that agree in a whole band are compared (locality-sensitive hashing; Indyk and
Motwani, 1998; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", §3.4). The comparison is
exact, and always with a conversation that is kept: none is dropped because of an estimate or a
chain of similar ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from rensa import RMinHash

from workflow_scripts.chats.messages import Message
from workflow_scripts.chats.shingles import mixed

N_PERMUTATIONS = 128
MINHASH_SEED = 42
BETWEEN_PARTS = " \ud800 "
# Share of the pairs at the threshold that must be found; more similar pairs are found more often.
RECALL = 0.99
# The key of a conversation without words, which is similar to no other.
NO_KEY = 0
# Limit to the kept conversations of one bucket that a conversation is compared with. Copies leave
# one kept conversation in a bucket. Many kept ones mean a text that the dataset repeats around
# different content, and comparing them all would take quadratic time. Other bands, in which the
# content shows, still find such a pair.
MOST_COMPARED = 16


def normalized_digest(messages: Sequence[Message], tools: str | None) -> bytes:
    """Return 16 bytes that are equal for equal content, ignoring case and white space.

    Roles, tool calls and the tools on offer count. Call ids do not, because they are random; nor do
    weights.
    """
    parts = [tools or ""]
    for message in messages:
        parts += (message["role"], message.get("content") or "")
        for call in message.get("tool_calls") or ():
            parts += ("call", call["function"]["name"], call["function"]["arguments"])
    # The parts are separated by a lone surrogate, which no text can contain.
    text = " ".join(BETWEEN_PARTS.join(parts).casefold().split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def first_of_equal(digests: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Return, for each conversation, the one of lowest rank with the same digest.

    Args:
        digests: (conversations, 2) uint64, from `normalized_digest`.
        rank: (conversations,) integers, each once; the lowest is kept.
    Returns:
        (conversations,) int64; −1 for a conversation that is itself the lowest.
    """
    order = np.lexsort((rank, digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first_of = order[is_first][np.cumsum(is_first) - 1]
    twins = np.full(len(order), -1, np.int64)
    twins[order[~is_first]] = first_of[~is_first]
    return twins


def choose_bands(threshold: float) -> tuple[int, int]:
    """Return the number of bands, and of slots per band, that find a pair at the threshold.

    A pair of similarity s agrees in one band of r slots with probability sʳ, and in one of b bands
    with 1 − (1 − sʳ)ᵇ. The longest bands that find RECALL of the pairs give the fewest comparisons:

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
    """Return one key per conversation and band; conversations that share a key are compared.

    Args:
        shingles: uint64 hashes of all conversations, one after the other. Repeats and order within
            a conversation do not matter.
        offsets: (conversations + 1,) where the hashes of each conversation begin.
    Returns:
        (conversations, bands) uint64; NO_KEY for a conversation without shingles.
    """
    n_bands, n_slots = choose_bands(threshold)
    n_conversations = len(offsets) - 1
    if n_conversations == 0:
        return np.empty((0, n_bands), np.uint64)
    # MinHash of the full set. Rensa's faster `rho` samples shingles by their order, so it would
    # treat a shifted copy as a different text.
    signatures = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, np.asarray(offsets, np.uint64), N_PERMUTATIONS, MINHASH_SEED
    )
    slots = np.array(signatures.to_rows(), np.uint64)[:, : n_bands * n_slots]
    slots = slots.reshape(n_conversations, n_bands, n_slots)
    keys = np.zeros((n_conversations, n_bands), np.uint64)
    for slot in range(n_slots):
        # Mixed at every step, because slots are 32 bits wide and their plain polynomials collide.
        keys = mixed(keys ^ slots[:, :, slot])
        keys += 0x9E3779B97F4A7C15
    keys[keys == NO_KEY] = 1
    keys[np.diff(np.asarray(offsets, np.int64)) == 0] = NO_KEY
    return keys


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return the shared shingles as a share of all; both arrays come from `np.unique`."""
    n_shared = len(np.intersect1d(first, second, assume_unique=True))
    n_all = len(first) + len(second) - n_shared
    return n_shared / n_all if n_all else 0.0


def near_duplicates(
    keys: np.ndarray,
    rank: np.ndarray,
    similarity: Callable[[int, int], float],
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the conversations that are near duplicates of one that is kept.

    In the order of their rank, each is compared with the kept ones that share a band with it,
    those that share most bands first. It is dropped if one is similar enough.

    Args:
        keys: (conversations, bands) uint64, from `band_keys`.
        rank: (conversations,) integers, each once; the lower is kept.
        similarity: exact similarity of the shingle sets of two conversations, by index. Called
            with a conversation and, in turn, the kept ones it may resemble.
        threshold: similarity from which the later conversation is dropped.
    Returns:
        duplicate_of: (conversations,) int64, the kept near duplicate; −1 if it is kept itself.
        similarity: (conversations,) float32, the similarity to that one; 0 if it is kept.
    """
    duplicate_of = np.full(len(keys), -1, np.int64)
    similarities = np.zeros(len(keys), np.float32)
    colliding = _colliding(keys, rank)
    buckets = _Buckets(keys, colliding)
    for place, newcomer in enumerate(colliding.tolist()):
        for other in buckets.candidates(place):
            found = similarity(newcomer, other)
            if found >= threshold:
                duplicate_of[newcomer], similarities[newcomer] = other, found
                break
        else:
            buckets.keep(place)
    return duplicate_of, similarities


def _colliding(keys: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Return the conversations that share a key with another, by rank; most share none."""
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
    """For each band and key, the first kept conversations that have that key.

    The buckets of a band follow each other in one array. Each has room for all its conversations,
    so the memory is known in advance: 16 bytes per conversation and band, and no Python objects.
    """

    def __init__(self, keys: np.ndarray, colliding: np.ndarray) -> None:
        n_colliding, n_bands = len(colliding), keys.shape[1]
        self._colliding = colliding
        self._start = np.empty((n_colliding, n_bands), np.int64)
        """Start of each conversation's bucket in each band."""
        self._members = np.empty(n_colliding * n_bands, np.int32)
        """Indices in `colliding`, bucket by bucket."""
        self._n_members = np.zeros(n_colliding * n_bands, np.int32)
        """Members of the bucket that starts here."""
        for band in range(n_bands):
            own = keys[colliding, band]
            order = np.argsort(own)
            ordered = own[order]
            begins = np.ones(n_colliding, dtype=bool)
            begins[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] == NO_KEY)
            starts = np.flatnonzero(begins)
            self._start[order, band] = band * n_colliding + starts[np.cumsum(begins) - 1]

    def candidates(self, place: int) -> list[int]:
        """Return the kept conversations to compare with: most shared bands first, then by rank."""
        starts = self._start[place]
        counts = self._n_members[starts]
        if not counts.any():
            return []
        ranges = zip(starts.tolist(), counts.tolist(), strict=True)
        members = np.concatenate([self._members[start : start + n] for start, n in ranges])
        places, n_shared = np.unique(members, return_counts=True)
        return self._colliding[places[np.argsort(-n_shared, kind="stable")]].tolist()

    def keep(self, place: int) -> None:
        """Add a kept conversation to those of its buckets that are not full."""
        starts = self._start[place]
        starts = starts[self._n_members[starts] < MOST_COMPARED]
        self._members[starts + self._n_members[starts]] = place
        self._n_members[starts] += 1
