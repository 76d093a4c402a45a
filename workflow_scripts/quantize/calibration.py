"""Text to calibrate on: sequences of token ids, and which of them are decoded together.

Chats keep their own boundaries: each is a sequence from its first token on, and sees no other. A
longer one is cut, each part with BOS in place of its first token, as llama-imatrix cuts its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from workflow_scripts.tokens.documents import Documents


def chats(documents: Documents, *, chunk_tokens: int, n_tokens: int) -> Iterator[np.ndarray]:
    """Sequences of conversations drawn at random, always the same ones, as often as training sees
    each.

    Args:
        chunk_tokens: longest sequence.
        n_tokens: of all sequences together, at most.
    """
    drawn = np.repeat(np.arange(len(documents)), documents.n_copies)
    np.random.default_rng(0).shuffle(drawn)
    sequences = (
        sequence
        for at in drawn
        for sequence in cut(documents[int(at)].input_ids, chunk_tokens=chunk_tokens)
    )
    return first_tokens(sequences, n_tokens)


def cut(input_ids: np.ndarray, *, chunk_tokens: int) -> Iterator[np.ndarray]:
    """Consecutive sequences of `chunk_tokens`, the last one shorter, each beginning with the
    first token of all."""
    for start in range(0, len(input_ids), chunk_tokens):
        sequence = np.array(input_ids[start : start + chunk_tokens], dtype=np.int32)
        sequence[0] = input_ids[0]
        yield sequence


def first_tokens(sequences: Iterable[np.ndarray], n_tokens: int) -> Iterator[np.ndarray]:
    """Sequences until they have `n_tokens`, the last of them cut to it."""
    left = n_tokens
    for sequence in sequences:
        yield sequence[:left]
        left -= len(sequence)
        if left <= 0:
            return


def batches(
    sequences: Iterable[np.ndarray], *, batch_tokens: int, n_sequences: int
) -> Iterator[list[np.ndarray]]:
    """Neighbours together, up to `batch_tokens` tokens and `n_sequences` sequences."""
    batch: list[np.ndarray] = []
    n_tokens = 0
    for sequence in sequences:
        if batch and (n_tokens + len(sequence) > batch_tokens or len(batch) == n_sequences):
            yield batch
            batch, n_tokens = [], 0
        batch.append(sequence)
        n_tokens += len(sequence)
    if batch:
        yield batch
