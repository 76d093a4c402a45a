"""Perplexity of one link of the chain on supervised tokens of held-out conversations.

Every link scores the same tokens of the same conversations, in pieces no longer than the sliding
window, so a difference between neighbouring links is the loss that one step adds. Models that
honour the window also score whole conversations; that figure is reported separately. The loss of
every token is kept, and every loss in the JSON is a sum over these. A quantization is compared with
the F16 GGUF in the same pass (`--reference`): KL divergence and top-1 agreement on the same tokens.

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

from workflow_scripts import files, log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.handover.scores import Divergence, Scores
from workflow_scripts.settings import EvaluationSettings

OUTPUT_VERSION = 4
logger = log.stage_logger("evaluate_perplexity")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--reference", type=Path, help="the F16 GGUF that --gguf was made from")
    parser.add_argument("--tokens", type=Path, required=True, help="documents of a held-out split")
    parser.add_argument("--clean", type=Path, help="conversations of that split, for their sources")
    parser.add_argument(
        "--memory-gb", type=float, help="memory for both GGUFs, GB; default: all that is free"
    )
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument(
        "--token-scores", type=Path, required=True, help="to write: the loss of every token"
    )
    parser.add_argument(
        "--divergence", type=Path, help="to write, with --reference: JSON of the comparison"
    )
    arguments, settings, link = link_arguments.parse(parser, argv, EvaluationSettings, "evaluation")
    if bool(arguments.reference) != bool(arguments.divergence):
        parser.error("--reference and --divergence go together")
    if arguments.reference and not link.gguf:
        parser.error("--reference is for a --gguf")

    import torch

    from workflow_scripts.evaluate import gguf_pair, links
    from workflow_scripts.scoring import pieces as cutting
    from workflow_scripts.scoring.likelihood import score_documents
    from workflow_scripts.scoring.token_scores import TokenScores
    from workflow_scripts.tokens.documents import Documents

    documents = list(itertools.islice(Documents(arguments.tokens), settings.max_conversations))
    piece_tokens = cutting.comparable_tokens(link.facts, settings.piece_tokens)
    pieces = list(cutting.cut(documents, piece_tokens=piece_tokens))
    if not pieces:
        raise log.StageError(
            "there is nothing to score",
            where=arguments.tokens,
            found=f"{len(documents)} documents, no supervised token",
            to_fix=f"raise datasets.<name>.cleaning.{arguments.tokens.stem}_fraction",
        )
    sources = sources_of(arguments.clean) if arguments.clean else None
    if link.gguf:
        torch.set_num_threads(link.n_threads)  # sums over logits use as many threads as llama.cpp
    shown = log.progress(pieces, logger, total=len(pieces), unit="pieces")
    started = time.perf_counter()
    whole_nats = None
    if link.gguf and arguments.reference:
        pair = gguf_pair.GgufPair(
            arguments.reference, link.gguf, cutting.longest(pieces), link.n_threads
        )
        memory_bytes = (arguments.memory_gb or 0) * 1e9 or gguf_pair.available_bytes()
        nats, distance, n_models = pair.compared(
            pieces, shown, link.facts, memory_bytes=memory_bytes, folder=arguments.scores.parent
        )
        Divergence(
            reference=arguments.reference.name,
            piece_tokens=piece_tokens,
            n_pieces=len(pieces),
            **dict(distance),
            n_models_in_memory=n_models,
            duration_seconds=time.perf_counter() - started,
        ).write(arguments.divergence)
    else:
        with links.loaded(link, cutting.longest(pieces)) as model:
            nats = score_documents(model, shown)
            if settings.full_length and not link.gguf:
                # A document no longer than a piece has been scored whole already.
                long = [len(document.input_ids) > piece_tokens for document in documents]
                whole = cutting.cut(documents, piece_tokens=link.facts.context_tokens)
                rest = score_documents(model, (one for one in whole if long[one.document]))
                whole_nats = nats | rest
    tokens = TokenScores.of(documents, nats, whole_nats=whole_nats, sources=sources)
    scores = Scores(
        piece_tokens=piece_tokens,
        n_pieces=len(pieces),
        size_bytes=links.size_bytes(link),
        precision=None if link.gguf else links.precision(link),
        **dict(tokens.metrics()),
        by_position=tokens.by_position(),
        by_turn=tokens.by_turn(),
        by_source=tokens.by_source(),
        duration_seconds=time.perf_counter() - started,
    )
    if tokens.whole_nats is not None:
        scores = scores.changed(
            n_conversations_beyond_piece=sum(long),
            **{f"full_length_{key}": value for key, value in tokens.metrics(tokens.whole_nats)},
        )
    tokens.write(arguments.token_scores)
    scores.write(arguments.scores)
    logger.info("scored %s", log.fields(scores.content()))


def sources_of(clean: Path) -> dict[str, str]:
    """Return the source of each conversation of a split, by id."""
    columns = files.read_parquet(clean, columns=["id", "source"])
    return dict(
        zip(columns.column("id").to_pylist(), columns.column("source").to_pylist(), strict=True)
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
