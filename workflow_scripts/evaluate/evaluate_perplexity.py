"""Perplexity of one link of the chain, on supervised tokens of held-out conversations.

Every link scores the same tokens of the same conversations, in pieces no longer than the sliding
window, so that a difference between neighbours is that link's loss. Models that honour the window
are scored on whole conversations as well; that figure stands apart. The loss of every token is
kept; whatever the JSON says of losses is a sum over it.

python -m workflow_scripts.evaluate.evaluate_perplexity --checkpoint merged/ --facts facts.json
    --tokens tokens/test.arrow --clean clean/test.parquet --settings '{}' --threads 2
    --scores merged.json --token-scores merged.tokens.parquet
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.evaluate import links
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import EvaluationSettings, settings_from_json

OUTPUT_VERSION = 3
logger = log.stage_logger("evaluate_perplexity")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    links.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of a held-out split")
    parser.add_argument("--clean", type=Path, help="their conversations: where each comes from")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation`, its scoring keys")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument(
        "--token-scores", type=Path, required=True, help="to write: the loss of every token"
    )
    arguments = parser.parse_args(argv)
    settings = settings_from_json(EvaluationSettings, arguments.settings)

    import torch

    from workflow_scripts.scoring.likelihood import score_documents
    from workflow_scripts.scoring.token_scores import TokenScores

    facts = files.read_json(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.max_conversations))
    if not documents:
        raise log.StageError(
            "there is nothing to score",
            where=arguments.tokens,
            found="no document",
            to_fix=f"raise datasets.<name>.cleaning.{arguments.tokens.stem}_fraction",
        )
    piece_tokens = cutting.comparable_tokens(facts, settings.piece_tokens)
    pieces = list(cutting.cut(documents, piece_tokens=piece_tokens))
    sources = sources_of(arguments.clean) if arguments.clean else None
    started = time.perf_counter()
    report: dict[str, Any] = {"piece_tokens": piece_tokens, "n_pieces": len(pieces)}
    report["size_bytes"] = links.size_bytes(arguments)
    shown = log.progress(pieces, logger, total=len(pieces), unit="pieces")
    if arguments.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        torch.set_num_threads(arguments.threads)  # sums over logits take no more than llama.cpp
        with LlamaCppModel(
            arguments.gguf, context_tokens=cutting.longest(pieces), n_threads=arguments.threads
        ) as model:
            scores = TokenScores.of(documents, score_documents(model, shown), sources=sources)
        report |= scores.metrics()
    else:
        report["precision"] = links.measured_precision(arguments.precision, arguments.checkpoint)
        model = links.load_transformers(arguments, facts)
        nats = score_documents(model, shown)
        # A document within one piece has been scored whole already.
        long = {
            number
            for number, document in enumerate(documents)
            if settings.full_length and len(document.input_ids) > piece_tokens
        }
        whole = cutting.cut(documents, piece_tokens=facts["context_tokens"])
        whole_nats = nats | score_documents(
            model, (piece for piece in whole if piece.document in long)
        )
        scores = TokenScores.of(
            documents,
            nats,
            whole_nats=whole_nats if settings.full_length else None,
            sources=sources,
        )
        report |= scores.metrics()
        if settings.full_length:
            report["n_conversations_beyond_piece"] = len(long)
            full_length = scores.metrics(scores.whole_nats)
            report |= {f"full_length_{key}": value for key, value in full_length.items()}
    report |= {
        "by_position": scores.by_position(),
        "by_turn": scores.by_turn(),
        "by_source": scores.by_source(),
        "duration_seconds": time.perf_counter() - started,
    }
    scores.write(arguments.token_scores)
    files.write_json(arguments.scores, report)
    logger.info("scored %s", log.fields(report))


def sources_of(clean: Path) -> dict[str, str]:
    """Source of each conversation of a split, by id."""
    columns = files.read_parquet(clean, columns=["id", "source"])
    return dict(
        zip(columns.column("id").to_pylist(), columns.column("source").to_pylist(), strict=True)
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
