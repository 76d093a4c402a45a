"""Perplexity of one link of the chain, on supervised tokens of held-out conversations.

Every link scores the same tokens of the same conversations, in pieces no longer than the sliding
window, so that a difference between neighbours is that link's loss. Models that honour the window
are scored on whole conversations as well; that figure stands apart. The loss of every token is
kept; whatever the JSON says of losses is a sum over it. A quantization is compared with the F16
GGUF in the same pass (`--reference`): KL divergence and top-1 agreement on the same tokens.

python -m workflow_scripts.evaluate.evaluate_perplexity --checkpoint merged/ --facts facts.json
    --tokens tokens/test.arrow --clean clean/test.parquet --settings '{}' --threads 2
    --scores merged.json --token-scores merged.tokens.parquet
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.scores import Distance, Divergence, Scores
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import EvaluationSettings, settings_from_json
from workflow_scripts.tokens.documents import Documents

if TYPE_CHECKING:
    from workflow_scripts.scoring.likelihood import Scores as Nats
    from workflow_scripts.scoring.pieces import Piece
    from workflow_scripts.tokens.documents import Document

OUTPUT_VERSION = 4
logger = log.stage_logger("evaluate_perplexity")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    link_arguments.add_arguments(parser)
    parser.add_argument("--reference", type=Path, help="the F16 GGUF that --gguf was made from")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of a held-out split")
    parser.add_argument("--clean", type=Path, help="their conversations: where each comes from")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation`, its scoring keys")
    parser.add_argument(
        "--memory-gb", type=float, help="to count on for both GGUFs, GB; default: what is free"
    )
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument(
        "--token-scores", type=Path, required=True, help="to write: the loss of every token"
    )
    parser.add_argument(
        "--divergence", type=Path, help="to write, with --reference: JSON of the comparison"
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.reference) != bool(arguments.divergence):
        parser.error("--reference and --divergence go together")
    if arguments.reference and not arguments.gguf:
        parser.error("--reference is for a --gguf")
    settings = settings_from_json(EvaluationSettings, arguments.settings)

    from workflow_scripts.scoring.token_scores import TokenScores

    facts = Facts.read(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.max_conversations))
    piece_tokens = cutting.comparable_tokens(facts, settings.piece_tokens)
    pieces = list(cutting.cut(documents, piece_tokens=piece_tokens))
    if not pieces:
        raise log.StageError(
            "there is nothing to score",
            where=arguments.tokens,
            found=f"{len(documents)} documents, no supervised token",
            to_fix=f"raise datasets.<name>.cleaning.{arguments.tokens.stem}_fraction",
        )
    sources = sources_of(arguments.clean) if arguments.clean else None
    started = time.perf_counter()
    whole_nats = precision = None
    if arguments.reference:
        nats, distance, n_models = score_with_reference(arguments, facts, pieces)
        Divergence(
            reference=arguments.reference.name,
            piece_tokens=piece_tokens,
            n_pieces=len(pieces),
            **dict(distance),
            n_models_in_memory=n_models,
            duration_seconds=time.perf_counter() - started,
        ).write(arguments.divergence)
    elif arguments.gguf:
        nats = score_gguf(arguments, pieces)
    else:
        precision = link_arguments.measured_precision(arguments.precision, arguments.checkpoint)
        long = {
            number
            for number, document in enumerate(documents)
            if len(document.input_ids) > piece_tokens
        }
        nats, whole_nats = score_transformers(
            arguments, facts, documents, pieces, long if settings.full_length else None
        )
    tokens = TokenScores.of(documents, nats, whole_nats=whole_nats, sources=sources)
    scores = Scores(
        piece_tokens=piece_tokens,
        n_pieces=len(pieces),
        size_bytes=link_arguments.size_bytes(arguments),
        **dict(tokens.metrics()),
        by_position=tokens.by_position(),
        by_turn=tokens.by_turn(),
        by_source=tokens.by_source(),
        duration_seconds=time.perf_counter() - started,
    )
    if precision is not None:
        scores = scores.changed(precision=precision)
    if tokens.whole_nats is not None:
        whole = tokens.metrics(tokens.whole_nats)
        scores = scores.changed(
            n_conversations_beyond_piece=len(long),
            **{f"full_length_{key}": value for key, value in whole},
        )
    tokens.write(arguments.token_scores)
    scores.write(arguments.scores)
    logger.info("scored %s", log.fields(scores.content()))


def score_gguf(arguments: argparse.Namespace, pieces: Sequence[Piece]) -> Nats:
    """Loss of each scored token by the GGUF, by document."""
    import torch

    from workflow_scripts.scoring.likelihood import score_documents
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

    torch.set_num_threads(arguments.threads)  # sums over logits take no more than llama.cpp
    context_tokens = cutting.longest(pieces)
    with LlamaCppModel(
        arguments.gguf, context_tokens=context_tokens, n_threads=arguments.threads
    ) as model:
        return score_documents(model, shown(pieces))


def score_with_reference(
    arguments: argparse.Namespace, facts: ModelShape, pieces: Sequence[Piece]
) -> tuple[Nats, Distance, int]:
    """Loss of each scored token by the GGUF, by document; how far it is from the reference; and how
    many models were in memory at once."""
    import torch

    from workflow_scripts.evaluate import gguf_pair
    from workflow_scripts.scoring import divergences

    torch.set_num_threads(arguments.threads)  # as in `score_gguf`
    pair = gguf_pair.GgufPair(
        arguments.reference, arguments.gguf, cutting.longest(pieces), arguments.threads
    )
    memory = arguments.memory_gb * 1e9 if arguments.memory_gb else gguf_pair.available_bytes()
    n_models = 2 if pair.needed_bytes(facts) <= memory else 1
    compared = (
        pair.side_by_side(pieces)
        if n_models == 2
        else pair.in_turns(pieces, facts.vocabulary_size, folder=arguments.scores.parent)
    )
    found = divergences.by_document(
        (piece.document, part) for piece, part in zip(shown(pieces), compared, strict=True)
    )
    nats = {document: part.nats for document, part in found.items()}
    return nats, divergences.metrics(found), n_models


def score_transformers(
    arguments: argparse.Namespace,
    facts: ModelShape,
    documents: Sequence[Document],
    pieces: Sequence[Piece],
    long: set[int] | None,
) -> tuple[Nats, Nats | None]:
    """Loss of each scored token by a checkpoint, by document: in pieces, and in whole documents.

    Args:
        long: documents longer than a piece, as the others have been scored whole already; None
            scores nothing whole.
    """
    from workflow_scripts.scoring.likelihood import score_documents

    model = link_arguments.load_transformers(arguments, facts)
    nats = score_documents(model, shown(pieces))
    if long is None:
        return nats, None
    whole = cutting.cut(documents, piece_tokens=facts.context_tokens)
    return nats, nats | score_documents(model, (one for one in whole if one.document in long))


def shown(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, with progress in the log."""
    return log.progress(pieces, logger, total=len(pieces), unit="pieces")


def sources_of(clean: Path) -> dict[str, str]:
    """Source of each conversation of a split, by id."""
    columns = files.read_parquet(clean, columns=["id", "source"])
    return dict(
        zip(columns.column("id").to_pylist(), columns.column("source").to_pylist(), strict=True)
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
