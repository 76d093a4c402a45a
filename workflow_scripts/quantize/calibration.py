"""Calibration text: sequences of token ids, and batches of sequences that are decoded together.

Every conversation is a separate sequence from its first token on, and sees no other. A conversation
longer than a sequence is cut; BOS replaces the first token of each part, as in llama-imatrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.tokens.documents import Documents

if TYPE_CHECKING:  # quantize_awq's environment has no llama.cpp
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

Item = TypeVar("Item")
# Tokens are seldom longer than this; text beyond it would not be used.
CHARACTERS_PER_TOKEN = 16


def chats(documents: Documents, *, chunk_tokens: int, n_tokens: int) -> Iterator[np.ndarray]:
    """Yield sequences of conversations in a fixed random order, each as often as training sees it.

    Args:
        chunk_tokens: longest sequence.
        n_tokens: limit for all sequences together.
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
    """Yield consecutive sequences of `chunk_tokens`, the last one shorter; each begins with the
    first token of `input_ids`."""
    for start in range(0, len(input_ids), chunk_tokens):
        sequence = np.array(input_ids[start : start + chunk_tokens], dtype=np.int32)
        sequence[0] = input_ids[0]
        yield sequence


def first_tokens(sequences: Iterable[np.ndarray], n_tokens: int) -> Iterator[np.ndarray]:
    """Yield sequences up to `n_tokens` in all; the last one is cut to fit."""
    left = n_tokens
    for sequence in sequences:
        yield sequence[:left]
        left -= len(sequence)
        if left <= 0:
            return


def text_file(
    path: Path, model: LlamaCppModel, *, chunk_tokens: int, n_tokens: int
) -> Iterator[np.ndarray]:
    """Tokenize a text file and cut it as llama-imatrix does."""
    files.check_whole(path)
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(CHARACTERS_PER_TOKEN * n_tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            "a text to calibrate on cannot be read", where=path, found=error
        ) from error
    input_ids = np.array(model.tokenize(text, adds_bos=True, parses_control=False))
    return first_tokens(cut(input_ids, chunk_tokens=chunk_tokens), n_tokens)


def batches(
    items: Iterable[Item], *, size: Callable[[Item], int], limit: int, n_items: int | None = None
) -> Iterator[list[Item]]:
    """Group neighbours; an item larger than the limit is a group by itself.

    Args:
        limit: largest sum of sizes in a group.
        n_items: most items in a group; None is any number.
    """
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and (total + size(item) > limit or len(batch) == n_items):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch
