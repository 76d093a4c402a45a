"""Perplexity of one link of the chain, on supervised tokens of held-out conversations.

Every link scores the same tokens of the same conversations, in pieces no longer than the sliding
window, so that a difference between neighbours is that link's loss. Models that honour the window
are scored on whole conversations as well; that figure stands apart.

python -m workflow_scripts.evaluate.evaluate_perplexity --checkpoint merged/ --facts facts.json
    --tokens tokens/test.arrow --settings '{}' --threads 2 --scores merged.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.evaluate import links
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import EvaluationSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("evaluate_perplexity")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    links.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of a held-out split")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation`, its scoring keys")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument(
        "--by-conversation",
        action="store_true",
        help="keep each conversation's loss and tokens: a paired comparison needs them",
    )
    arguments = parser.parse_args(argv)
    settings = settings_from_json(EvaluationSettings, arguments.settings)

    from workflow_scripts.scoring.likelihood import by_conversation, score_documents, summarize

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
    started = time.perf_counter()
    report = {"piece_tokens": piece_tokens, "n_pieces": len(pieces)}
    if arguments.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        with LlamaCppModel(
            arguments.gguf, context_tokens=piece_tokens, n_threads=arguments.threads
        ) as model:
            shown = log.progress(pieces, logger, total=len(pieces), unit="pieces")
            scores = score_documents(model, shown)
            report |= summarize(scores)
            sums = by_conversation(scores)
    else:
        precision = links.measured_precision(arguments.precision)
        model = links.load_transformers(arguments, facts)
        shown = log.progress(pieces, logger, total=len(pieces), unit="pieces")
        scores = score_documents(model, shown)
        report |= {"precision": precision} | summarize(scores)
        sums = by_conversation(scores)
        # A document within one piece has been scored whole already.
        long = {
            number
            for number, document in enumerate(documents)
            if len(document.input_ids) > piece_tokens
        }
        whole = cutting.cut(documents, piece_tokens=facts["context_tokens"])
        scores |= score_documents(model, (piece for piece in whole if piece.document in long))
        report["n_conversations_beyond_piece"] = len(long)
        report |= {f"full_length_{key}": value for key, value in summarize(scores).items()}
    report["duration_seconds"] = time.perf_counter() - started
    files.write_json(arguments.scores, report | (sums if arguments.by_conversation else {}))
    logger.info("scored %s", log.fields(report))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
