"""Measure a link's usable context: questions on long texts, and the gain from long context.

The score of a length is the share of right answers over all tasks and depths, in per cent. The
effective length is the longest up to which every score is at least 85.6 (RULER, arXiv:2404.06654:
the score of Llama-2-7B at 4k), or at least 85 % of the best score at short lengths (NoLiMa,
arXiv:2502.05167). A model that answers nothing at the shortest length has no effective length: it
is not measurable, which is not the same as zero.

The gain is measured on test tokens beyond `short_tokens`: their loss with `short_tokens` of context
minus their loss with all of it. It is positive if the rest of the context helps.

python -m workflow_scripts.evaluate.evaluate_context --checkpoint merged/ --facts facts.json
    --tokenizer tokenizer/ --tokens tokens/test.arrow --settings '{}' --threads 8
    --scores merged.context.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.demo import stdlib_docs
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.evaluate.questions import WITHOUT_DEPTH
from workflow_scripts.handover.context import ContextScores, LengthScore
from workflow_scripts.settings import ContextSettings

OUTPUT_VERSION = 3
SHORTEST_TOKENS = 128
logger = log.stage_logger("evaluate_context")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        help="texts to ask about; default: Python's own documentation",
    )
    parser.add_argument("--tokens", type=Path, required=True, help="documents of the test split")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    arguments, settings, link = link_arguments.parse(
        parser, argv, ContextSettings, "evaluation.context"
    )

    from workflow_scripts.evaluate import context_length, links, long_prompts
    from workflow_scripts.evaluate.needles import NeedlePrompts, haystack
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
    from workflow_scripts.tokens.documents import Documents
    from workflow_scripts.tokens.rendering import Renderer

    facts = link.facts
    context_tokens = facts.served_context_tokens if link.gguf else facts.context_tokens
    questions = questions_of(settings, lengths_of(settings, context_tokens))
    prompts = NeedlePrompts(
        haystack({"role": "text", "content": text} for text in haystack_texts(arguments.texts)),
        Renderer(load_mistral_tokenizer(arguments.tokenizer, for_training=True)),
        seed=settings.seed,
    )
    documents = Documents(arguments.tokens)
    started = time.perf_counter()
    with links.loaded(link, context_tokens) as model:
        shown = log.progress(questions, logger, total=len(questions), unit="cells")
        cells = long_prompts.measure(model, prompts, shown, settings)
        gain = context_length.long_gain(model, documents, context_tokens, settings)
    by_length = context_length.scores_by_length(cells)
    scores = ContextScores(
        advertised_tokens=facts.context_tokens,
        context_tokens=context_tokens,
        sliding_window=facts.sliding_window,
        cells=tuple(cells),
        scores=tuple(
            LengthScore(length_tokens=length, score_percent=score)
            for length, score in by_length.items()
        ),
        n_prompts=sum(cell.n_prompts for cell in cells),
        **dict(context_length.effective_lengths(by_length)),
        **dict(context_length.effective_intervals(cells, seed=settings.seed)),
        **gain.content(),
        duration_seconds=time.perf_counter() - started,
    )
    scores.write(arguments.scores)
    logger.info("scored %s", log.fields({**scores.content(), "cells": len(cells)}))


def haystack_texts(paths: Sequence[Path] | None) -> Iterator[str]:
    """Yield the texts that fill the prompts: the user's files, or Python's own documentation, which
    every machine has."""
    if paths:
        for path in paths:
            files.check_whole(path)
            yield path.read_text(encoding="utf-8")
        return
    for entry in stdlib_docs.entries():
        yield f"{entry.call or entry.name}\n\n{entry.docstring}"
    yield from stdlib_docs.module_sources()


def lengths_of(settings: ContextSettings, context_tokens: int) -> list[int]:
    """Return the lengths of the prompts, ascending; none is longer than the context.

    Raises:
        StageError: no requested length fits.
    """
    wanted = settings.lengths_tokens
    if wanted is None:
        doubled = (context_tokens >> halvings for halvings in range(6, -1, -1))
        return [length for length in doubled if length >= SHORTEST_TOKENS] or [context_tokens]
    fitting = sorted({length for length in wanted if length <= context_tokens})
    if not fitting:
        raise log.StageError(
            "every prompt is longer than the context",
            where="evaluation.context.lengths_tokens",
            found=wanted,
            expected=f"at most {context_tokens}",
        )
    return fitting


def questions_of(
    settings: ContextSettings, lengths: Sequence[int]
) -> list[tuple[str, int, float | None]]:
    """Return task, length and depth of every cell; the depth is None for a task without one."""
    return [
        (task, length, depth)
        for length in sorted(lengths, reverse=True)  # a prompt that cannot be made stops at once
        for task in settings.tasks
        for depth in ([None] if task in WITHOUT_DEPTH else settings.depths)
    ]


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
