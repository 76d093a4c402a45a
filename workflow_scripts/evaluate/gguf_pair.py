"""A quantized GGUF and the F16 one it was made from, read over the same tokens.

One pass gives the quantization's loss and its divergence from F16, token by token. Both models run
in one process, and no logits are kept. Where memory does not hold both models they take turns: the
logits of some pieces wait on disk in float32, so that the result is the same to the bit.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.scoring.divergences import Divergences, compare

if TYPE_CHECKING:
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.scoring.pieces import Piece

F16_BYTES = 2
# Next to weights and caches: what llama.cpp computes in, the logits of a batch, torch.
OTHER_BYTES = 2 * 10**9
# Logits on disk at a time; between two turns the models are loaded again.
SCRATCH_BYTES = 32 * 10**9


class GgufPair(NamedTuple):
    """Two GGUFs and how they are loaded."""

    reference: Path
    other: Path
    context_tokens: int
    n_threads: int

    def needed_bytes(self, facts: ModelShape) -> int:
        """Memory of both models at once: files, key-value caches, and what they compute in."""
        key_values = 2 * facts.n_layers * facts.n_kv_heads * facts.head_dim
        cache = key_values * F16_BYTES * self.context_tokens
        files = (self.reference, self.other)
        return sum(path.stat().st_size for path in files) + 2 * cache + OTHER_BYTES

    def side_by_side(self, pieces: Sequence[Piece]) -> Iterator[Divergences]:
        """Both models in memory, batch by batch."""
        with self._load(self.reference) as reference, self._load(self.other) as other:
            for piece in pieces:
                at = (piece.input_ids, piece.scored - 1)
                targets = piece.input_ids[piece.scored]
                yield compare(reference.logit_blocks(*at), other.logit_blocks(*at), targets)

    def in_turns(
        self, pieces: Sequence[Piece], n_vocabulary: int, *, folder: Path
    ) -> Iterator[Divergences]:
        """One model in memory at a time: the reference's logits of some pieces, then the other's.

        Args:
            n_vocabulary: logits a position.
            folder: on the disk that holds the logits meanwhile; takes half of what is free there,
                at most.
        """
        from workflow_scripts.scoring.scratch_logits import BYTES_PER_LOGIT, ScratchLogits

        folder.mkdir(parents=True, exist_ok=True)
        room = min(SCRATCH_BYTES, shutil.disk_usage(folder).free // 2)
        for some in rounds(pieces, room // (BYTES_PER_LOGIT * n_vocabulary)):
            n_blocks = []
            with ScratchLogits(folder) as scratch:
                with self._load(self.reference) as model:
                    for piece in some:
                        blocks = model.logit_blocks(piece.input_ids, piece.scored - 1)
                        n_blocks.append(sum(1 for _ in map(scratch.write, blocks)))
                waiting = scratch.read()
                with self._load(self.other) as model:
                    for piece, n in zip(some, n_blocks, strict=True):
                        blocks = model.logit_blocks(piece.input_ids, piece.scored - 1)
                        targets = piece.input_ids[piece.scored]
                        yield compare(itertools.islice(waiting, n), blocks, targets)

    def _load(self, path: Path) -> LlamaCppModel:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        return LlamaCppModel(path, context_tokens=self.context_tokens, n_threads=self.n_threads)


def rounds(pieces: Sequence[Piece], n_positions: int) -> Iterator[list[Piece]]:
    """Pieces in order, in parts of at most so many scored positions, or of one piece."""
    part: list[Piece] = []
    n = 0
    for piece in pieces:
        if part and n + len(piece.scored) > n_positions:
            yield part
            part, n = [], 0
        part.append(piece)
        n += len(piece.scored)
    if part:
        yield part


def available_bytes() -> int:
    """Memory that is free where llama.cpp puts its weights."""
    import llama_cpp

    from workflow_scripts.train.memory import device, ram

    if llama_cpp.llama_supports_gpu_offload():
        return device.available_bytes()
    return ram.available_ram_bytes()
