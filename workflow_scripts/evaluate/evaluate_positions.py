"""Loss by position in the conversation: does a model still read well far from the beginning?

Validation conversations, whole, each alone, with the model's own window; supervised tokens only,
in buckets of position that double. Nothing is cut but what lies beyond the model's context.

python -m workflow_scripts.evaluate.evaluate_positions --checkpoint checkpoint/ --adapter adapter/
    --precision nf4 --facts facts.json --tokens tokens/validation.arrow --settings '{}'
    --scores positions.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.scores import PositionScores
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.settings import EvaluationSettings, settings_from_json
from workflow_scripts.tokens.documents import Document, Documents

OUTPUT_VERSION = 1
logger = log.stage_logger("evaluate_positions")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    link_arguments.add_transformers_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of a held-out split")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation`, its scoring keys")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(EvaluationSettings, arguments.settings)

    from workflow_scripts.scoring.likelihood import score_documents
    from workflow_scripts.scoring.token_scores import TokenScores

    facts = Facts.read(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.max_conversations))
    pieces = list(whole_pieces(documents, context_tokens=facts.context_tokens))
    if not pieces:
        raise log.StageError(
            "there is nothing to score",
            where=arguments.tokens,
            found="no supervised token within the model's context",
            to_fix="raise datasets.<name>.cleaning.validation_fraction",
        )
    started = time.perf_counter()
    model = link_arguments.load_transformers(arguments, facts)
    shown = log.progress(pieces, logger, total=len(pieces), unit="conversations")
    tokens = TokenScores.of(
        documents,
        score_documents(model, shown),
        positions={piece.document: piece.scored for piece in pieces},
    )
    scores = PositionScores(
        precision=link_arguments.measured_precision(arguments.precision),
        sliding_window=facts.sliding_window,
        n_tokens_beyond_context=sum(
            max(0, len(document.input_ids) - facts.context_tokens) for document in documents
        ),
        **dict(tokens.metrics()),
        buckets=tokens.by_position(),
        duration_seconds=time.perf_counter() - started,
    )
    scores.write(arguments.scores)
    logger.info("scored %s", log.fields(scores.content()))


def whole_pieces(documents: Iterable[Document], *, context_tokens: int) -> Iterator[Piece]:
    """A piece a document: all of it, up to the context; none where nothing is supervised."""
    import numpy as np

    for number, document in enumerate(documents):
        is_scored = document.is_supervised[:context_tokens].copy()
        is_scored[:1] = False  # nothing comes before the first token
        if is_scored.any():
            input_ids = document.input_ids[:context_tokens]
            yield Piece(number, input_ids, np.flatnonzero(is_scored))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
