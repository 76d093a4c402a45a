"""A quantized GGUF and the F16 GGUF it was made from, on the same tokens.

One pass gives the quantization's loss and its divergence from F16, token by token. Both models run
in one process, and no logits are kept. If memory does not hold both models, they take turns: the
logits of some pieces wait on disk in float32, so the result is the same to the bit.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import torch
from torch import Tensor

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.scores import Distance
from workflow_scripts.quantize import calibration
from workflow_scripts.scoring import divergences
from workflow_scripts.scoring.divergences import Divergences, compare
from workflow_scripts.scoring.likelihood import Scores
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.scoring.scratch_logits import BYTES_PER_LOGIT, ScratchLogits
from workflow_scripts.train.memory import device, ram

F16_BYTES = 2
# Next to weights and caches: llama.cpp's compute buffers, the logits of a batch, torch.
OTHER_BYTES = 2 * 10**9
# Logits on disk at a time; after each turn the models are loaded again.
SCRATCH_BYTES = 32 * 10**9


class GgufPair(NamedTuple):
    """Two GGUFs and how they are loaded."""

    reference: Path
    other: Path
    context_tokens: int
    n_threads: int

    def compared(
        self,
        pieces: Sequence[Piece],
        shown: Iterable[Piece],
        facts: ModelShape,
        *,
        memory_bytes: float,
        folder: Path,
    ) -> tuple[Scores, Distance, int]:
        """Return the other model's loss of each scored token by document, its distance from the
        reference, and the number of models that were in memory at once.

        Args:
            shown: the pieces again, with progress in the log.
            memory_bytes: memory for both models; with less than they need they take turns.
            folder: as in `in_turns`.
        """
        torch.set_num_threads(self.n_threads)  # for sums over logits: no more than llama.cpp's
        n_models = 2 if self.needed_bytes(facts) <= memory_bytes else 1
        compared = (
            self.side_by_side(pieces)
            if n_models == 2
            else self.in_turns(pieces, facts.vocabulary_size, folder=folder)
        )
        found = divergences.by_document(
            (piece.document, part) for piece, part in zip(shown, compared, strict=True)
        )
        nats = {document: part.nats for document, part in found.items()}
        return nats, divergences.metrics(found), n_models

    def needed_bytes(self, facts: ModelShape) -> int:
        """Memory of both models at once: files, key-value caches and compute buffers."""
        key_values = 2 * facts.n_layers * facts.n_kv_heads * facts.head_dim
        cache = key_values * F16_BYTES * self.context_tokens
        files = (self.reference, self.other)
        return sum(path.stat().st_size for path in files) + 2 * cache + OTHER_BYTES

    def side_by_side(self, pieces: Sequence[Piece]) -> Iterator[Divergences]:
        """Compare with both models in memory, batch by batch."""
        with self._load(self.reference) as reference, self._load(self.other) as other:
            for piece in pieces:
                targets = piece.input_ids[piece.scored]
                yield compare(_blocks(reference, piece), _blocks(other, piece), targets)

    def in_turns(
        self, pieces: Sequence[Piece], n_vocabulary: int, *, folder: Path
    ) -> Iterator[Divergences]:
        """Compare with one model in memory at a time: first the reference's logits of some pieces,
        then the other model's.

        Args:
            n_vocabulary: logits per position.
            folder: where the logits wait; they take at most half of the disk's free space.
        """
        folder.mkdir(parents=True, exist_ok=True)
        room = min(SCRATCH_BYTES, shutil.disk_usage(folder).free // 2)
        limit = room // (BYTES_PER_LOGIT * n_vocabulary)  # scored positions
        for some in calibration.batches(pieces, size=lambda piece: len(piece.scored), limit=limit):
            with ScratchLogits(folder) as scratch:
                with self._load(self.reference) as model:
                    n_blocks = [
                        sum(1 for _ in map(scratch.write, _blocks(model, piece))) for piece in some
                    ]
                waiting = scratch.read()
                with self._load(self.other) as model:
                    for piece, n in zip(some, n_blocks, strict=True):
                        targets = piece.input_ids[piece.scored]
                        yield compare(itertools.islice(waiting, n), _blocks(model, piece), targets)

    def _load(self, path: Path) -> LlamaCppModel:
        return LlamaCppModel(path, context_tokens=self.context_tokens, n_threads=self.n_threads)


def _blocks(model: LlamaCppModel, piece: Piece) -> Iterator[Tensor]:
    return model.logit_blocks(piece.input_ids, piece.scored - 1)


def available_bytes() -> int:
    """Free memory of the device that llama.cpp puts its weights on."""
    if llama_cpp.llama_supports_gpu_offload():
        return device.available_bytes()
    return ram.available_ram_bytes()
