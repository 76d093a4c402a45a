"""Loss by position in the conversation: does a model still predict well far from the beginning?

Each validation conversation is scored whole and alone, with the model's own window. Only supervised
tokens count, in buckets of position that double. Only text beyond the model's context is cut off.

python -m workflow_scripts.evaluate.evaluate_positions --checkpoint checkpoint/ --adapter adapter/
    --precision nf4 --facts facts.json --tokens tokens/validation.arrow --settings '{}'
    --scores positions.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.scores import PositionScores
from workflow_scripts.settings import EvaluationSettings

OUTPUT_VERSION = 1
logger = log.stage_logger("evaluate_positions")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="documents of a held-out split")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    arguments, settings, link = link_arguments.parse(
        parser, argv, EvaluationSettings, "evaluation", takes_gguf=False
    )

    from workflow_scripts.evaluate import links
    from workflow_scripts.scoring.likelihood import score_documents
    from workflow_scripts.scoring.pieces import cut
    from workflow_scripts.scoring.token_scores import TokenScores
    from workflow_scripts.tokens.documents import Documents

    context_tokens = link.facts.context_tokens
    documents = list(itertools.islice(Documents(arguments.tokens), settings.max_conversations))
    read = [
        replace(
            document,
            input_ids=document.input_ids[:context_tokens],
            is_supervised=document.is_supervised[:context_tokens],
        )
        for document in documents
    ]
    pieces = list(cut(read, piece_tokens=None))
    if not pieces:
        raise log.StageError(
            "there is nothing to score",
            where=arguments.tokens,
            found="no supervised token within the model's context",
            to_fix="raise datasets.<name>.cleaning.validation_fraction",
        )
    started = time.perf_counter()
    with links.loaded(link, context_tokens) as model:
        shown = log.progress(pieces, logger, total=len(pieces), unit="conversations")
        tokens = TokenScores.of(read, score_documents(model, shown))
    scores = PositionScores(
        precision=links.precision(link),
        sliding_window=link.facts.sliding_window,
        n_tokens_beyond_context=sum(
            max(0, len(document.input_ids) - context_tokens) for document in documents
        ),
        **dict(tokens.metrics()),
        buckets=tokens.by_position(),
        duration_seconds=time.perf_counter() - started,
    )
    scores.write(arguments.scores)
    logger.info("scored %s", log.fields(scores.content()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
