"""KL divergence and top-1 agreement of a quantized GGUF with the F16 one it is made of.

On supervised tokens of held-out conversations, in the pieces that every link of the chain scores.
Both models decode the same tokens in one process, and what is kept of a token is its divergence.
Where memory does not hold both they take turns: the logits of some pieces wait on disk in float32,
so that the result is the same to the bit.

python -m workflow_scripts.evaluate.evaluate_divergence --reference run-F16.gguf
    --gguf run-Q4_K_M.gguf --facts facts.json --tokens tokens/test.arrow --settings '{}'
    --threads 2 --divergence Q4_K_M.divergence.json
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import EvaluationSettings, settings_from_json

if TYPE_CHECKING:
    from workflow_scripts.scoring.divergences import Divergences
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.scoring.pieces import Piece

OUTPUT_VERSION = 1
F16_BYTES = 2
# Beside weights and caches: what llama.cpp computes in, the logits of a batch, torch.
OTHER_BYTES = 2 * 10**9
# Of logits on disk at a time; between two turns the models are loaded again.
SCRATCH_BYTES = 32 * 10**9
logger = log.stage_logger("evaluate_divergence")


class Pair(NamedTuple):
    """Two GGUFs and how they are loaded."""

    reference: Path
    other: Path
    context_tokens: int
    n_threads: int

    def load(self, path: Path) -> LlamaCppModel:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        return LlamaCppModel(path, context_tokens=self.context_tokens, n_threads=self.n_threads)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="GGUF in F16")
    parser.add_argument("--gguf", type=Path, required=True, help="GGUF made of it")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of a held-out split")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation`, its scoring keys")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads of llama.cpp")
    parser.add_argument("--memory-gb", type=float, help="to count on, GB; default: what is free")
    parser.add_argument("--divergence", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(EvaluationSettings, arguments.settings)

    import torch

    from workflow_scripts.scoring import divergences

    torch.set_num_threads(arguments.threads)  # sums over logits take no more than llama.cpp
    facts = files.read_json(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.max_conversations))
    piece_tokens = cutting.comparable_tokens(facts, settings.piece_tokens)
    pieces = list(cutting.cut(documents, piece_tokens=piece_tokens))
    if not pieces:
        raise log.StageError(
            "there is nothing to compare on",
            where=arguments.tokens,
            found=f"{len(documents)} documents, no supervised token",
            to_fix=f"raise datasets.<name>.cleaning.{arguments.tokens.stem}_fraction",
        )
    context_tokens = cutting.longest(pieces)
    pair = Pair(arguments.reference, arguments.gguf, context_tokens, arguments.threads)
    needed = needed_bytes(pair, facts)
    available = arguments.memory_gb * 1e9 if arguments.memory_gb else available_bytes()
    holds_both = needed <= available
    started = time.perf_counter()
    if holds_both:
        compared = side_by_side(pair, pieces)
    else:
        logger.warning(
            "found memory for one model at a time needed_gb=%.1f available_gb=%.1f",
            *(needed / 1e9, available / 1e9),
        )
        arguments.divergence.parent.mkdir(parents=True, exist_ok=True)
        compared = in_turns(pair, pieces, facts, folder=arguments.divergence.parent)
    shown = log.progress(compared, logger, total=len(pieces), unit="pieces")
    found = divergences.by_document(
        (piece.document, part) for piece, part in zip(pieces, shown, strict=True)
    )
    report = {
        "reference": arguments.reference.name,
        "piece_tokens": piece_tokens,
        "n_pieces": len(pieces),
        **divergences.metrics(found),
        "n_models_in_memory": 2 if holds_both else 1,
        "duration_seconds": time.perf_counter() - started,
    }
    files.write_json(arguments.divergence, report)
    logger.info("compared %s", log.fields(report))


def side_by_side(pair: Pair, pieces: Sequence[Piece]) -> Iterator[Divergences]:
    """Both models in memory, batch by batch; the divergences of each piece."""
    from workflow_scripts.scoring.divergences import compare

    with pair.load(pair.reference) as reference, pair.load(pair.other) as other:
        for piece in pieces:
            at = (piece.input_ids, piece.scored - 1)
            targets = piece.input_ids[piece.scored]
            yield compare(reference.logit_blocks(*at), other.logit_blocks(*at), targets)


def in_turns(
    pair: Pair, pieces: Sequence[Piece], facts: dict[str, Any], *, folder: Path
) -> Iterator[Divergences]:
    """One model in memory at a time: the reference's logits of some pieces, then the other's.

    Args:
        folder: on the disk that holds the logits meanwhile; half of what is free there, at most.
    """
    from workflow_scripts.scoring.divergences import compare
    from workflow_scripts.scoring.scratch_logits import BYTES_PER_LOGIT, ScratchLogits

    room = min(SCRATCH_BYTES, shutil.disk_usage(folder).free // 2)
    for some in rounds(pieces, room // (BYTES_PER_LOGIT * facts["vocabulary_size"])):
        n_blocks = []
        with ScratchLogits(folder) as scratch:
            with pair.load(pair.reference) as model:
                for piece in some:
                    blocks = model.logit_blocks(piece.input_ids, piece.scored - 1)
                    n_blocks.append(sum(1 for _ in map(scratch.write, blocks)))
            waiting = scratch.read()
            with pair.load(pair.other) as model:
                for piece, n in zip(some, n_blocks, strict=True):
                    blocks = model.logit_blocks(piece.input_ids, piece.scored - 1)
                    targets = piece.input_ids[piece.scored]
                    yield compare(itertools.islice(waiting, n), blocks, targets)


def rounds(pieces: Sequence[Piece], n_positions: int) -> Iterator[list[Piece]]:
    """Pieces in order, each part with at most so many scored positions, or of one piece."""
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


def needed_bytes(pair: Pair, facts: dict[str, Any]) -> int:
    """Memory of both models at once: files, key-value caches, and what they compute in."""
    key_values = 2 * facts["n_layers"] * facts["n_kv_heads"] * facts["head_dim"]
    cache = key_values * F16_BYTES * pair.context_tokens
    return sum(path.stat().st_size for path in pair[:2]) + 2 * cache + OTHER_BYTES


def available_bytes() -> int:
    """Memory that is free where llama.cpp puts its weights."""
    import llama_cpp

    from workflow_scripts.train.memory import device

    if llama_cpp.llama_supports_gpu_offload():
        return device.available_bytes()
    return device.available_ram_bytes()


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
