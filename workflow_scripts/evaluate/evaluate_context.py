"""How much of its context a link can use: questions on long texts, and what long context gains.

A length's score is the share of right answers over all tasks and depths, in per cent. The effective
length is the longest up to which every score is at least 85.6 (RULER, arXiv:2404.06654: what
Llama-2-7B scores at 4k), or at least 85 % of the best score at short lengths (NoLiMa,
arXiv:2502.05167). A model that answers nothing at the shortest length has none: not measurable, and
not zero.

The gain is the loss of test tokens that lie beyond `short_tokens`, with no more context than that
less with all of it, on the same tokens: positive where the rest of the context helps.

python -m workflow_scripts.evaluate.evaluate_context --checkpoint merged/ --facts facts.json
    --tokenizer tokenizer/ --tokens tokens/test.arrow --settings '{}' --threads 8
    --scores merged.context.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.evaluate import link_arguments
from workflow_scripts.evaluate.long_prompts import answer, summarize
from workflow_scripts.evaluate.needles import NeedlePrompts, haystack
from workflow_scripts.evaluate.questions import WITHOUT_DEPTH
from workflow_scripts.handover.context import (
    ContextScores,
    EffectiveIntervals,
    EffectiveLengths,
    LengthScore,
    LongGain,
    TaskCell,
)
from workflow_scripts.handover.facts import Facts
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import ContextSettings, settings_from_json
from workflow_scripts.tokens.documents import Document, Documents
from workflow_scripts.tokens.rendering import Renderer

if TYPE_CHECKING:
    from workflow_scripts.scoring.likelihood import LogitModel

OUTPUT_VERSION = 3
RULER_PERCENT = 85.6
NOLIMA_FRACTION = 0.85
NOLIMA_SHORT_TOKENS = 1024  # its base score is the best up to here
SHORTEST_TOKENS = 128
N_DRAWS = 2000
INTERVAL_PERCENT = (2.5, 97.5)
logger = log.stage_logger("evaluate_context")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    link_arguments.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument(
        "--texts", type=Path, nargs="+", help="text to ask about; none: Python's own documentation"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="documents of the test split")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.context`")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(ContextSettings, arguments.settings)
    facts = Facts.read(arguments.facts)
    context = facts.served_context_tokens if arguments.gguf else facts.context_tokens
    lengths = lengths_of(settings, context)
    prompts = NeedlePrompts(
        haystack({"role": "text", "content": text} for text in haystack_texts(arguments.texts)),
        Renderer(load_mistral_tokenizer(arguments.tokenizer, for_training=True)),
        seed=settings.seed,
    )
    documents = Documents(arguments.tokens)

    started = time.perf_counter()
    if arguments.gguf:
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        with LlamaCppModel(
            arguments.gguf, context_tokens=context, n_threads=arguments.threads
        ) as model:
            cells = measure(model, prompts, lengths, settings)
            gain = long_gain(model, documents, context, settings)
    else:
        loaded = link_arguments.load_transformers(arguments, facts)
        cells = measure(loaded, prompts, lengths, settings)
        gain = long_gain(loaded, documents, context, settings)
    by_length = scores_by_length(cells)
    scores = ContextScores(
        advertised_tokens=facts.context_tokens,
        context_tokens=context,
        sliding_window=facts.sliding_window,
        cells=tuple(cells),
        scores=tuple(
            LengthScore(length_tokens=length, score_percent=score)
            for length, score in by_length.items()
        ),
        n_prompts=sum(cell.n_prompts for cell in cells),
        **dict(effective_lengths(by_length)),
        **dict(effective_intervals(cells, seed=settings.seed)),
        **gain.content(),
        duration_seconds=time.perf_counter() - started,
    )
    scores.write(arguments.scores)
    logger.info("scored %s", log.fields({**scores.content(), "cells": len(cells)}))


def haystack_texts(paths: Sequence[Path] | None) -> Iterator[str]:
    """What the prompts are filled with: files of the user's, or what every machine has."""
    if paths:
        for path in paths:
            files.check_whole(path)
            yield path.read_text(encoding="utf-8")
        return
    from workflow_scripts.demo import stdlib_docs

    for entry in stdlib_docs.entries():
        yield f"{entry.call or entry.name}\n\n{entry.docstring}"
    yield from stdlib_docs.module_sources()


def lengths_of(settings: ContextSettings, context_tokens: int) -> list[int]:
    """Ascending; of a GGUF no longer than it serves.

    Raises:
        StageError: none of the lengths asked for fits.
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


def measure(
    model: LogitModel,
    prompts: NeedlePrompts,
    lengths: Sequence[int],
    settings: ContextSettings,
) -> list[TaskCell]:
    """A cell a task, length and depth; a task that has no depth is asked as often, in one cell."""
    wanted = [
        (task, length, depth)
        for length in sorted(lengths, reverse=True)  # what cannot be made stops at once
        for task in settings.tasks
        for depth in ([None] if task in WITHOUT_DEPTH else settings.depths)
    ]
    cells: list[TaskCell] = []
    for task, length, depth in log.progress(wanted, logger, total=len(wanted), unit="cells"):
        n_prompts = settings.n_prompts * (len(settings.depths) if depth is None else 1)
        answers = [
            answer(
                model,
                prompts.make(number, length_tokens=length, depth_fraction=depth or 0, task=task),
            )
            for number in range(n_prompts)
        ]
        cell = summarize(answers, length_tokens=length, depth_fraction=depth)
        cells.append(TaskCell(task=task, **dict(cell)))
    return sorted(cells, key=lambda cell: (cell.task, cell.length_tokens, cell.depth_fraction or 0))


def scores_by_length(
    cells: Sequence[TaskCell], n_right: Sequence[float] | None = None
) -> dict[int, float]:
    """Length → per cent of right answers, every task weighing the same, as in RULER.

    Args:
        n_right: right answers of each cell, where they are not those it has.
    """
    right = [cell.n_exact for cell in cells] if n_right is None else n_right
    scores = {}
    for length in sorted({cell.length_tokens for cell in cells}):
        shares = []
        for task in sorted({cell.task for cell in cells}):
            of_task = [
                (cell, n)
                for cell, n in zip(cells, right, strict=True)
                if (cell.task, cell.length_tokens) == (task, length)
            ]
            n_prompts = sum(cell.n_prompts for cell, _ in of_task)
            shares.append(sum(n for _, n in of_task) / n_prompts)
        scores[length] = 100 * sum(shares) / len(shares)
    return scores


def effective_lengths(scores: Mapping[int, float]) -> EffectiveLengths:
    """By both definitions; null where none is measurable, 0 where even the shortest is too long.

    Args:
        scores: per cent by length, ascending.
    """
    shortest = min(scores)
    is_measurable = scores[shortest] > 0
    short = [score for length, score in scores.items() if length <= NOLIMA_SHORT_TOKENS]
    base = max(short, default=scores[shortest])

    def longest(least: float) -> int | None:
        if not is_measurable:
            return None
        good = itertools.takewhile(lambda length: scores[length] >= least, sorted(scores))
        return max(good, default=0)

    return EffectiveLengths(
        is_measurable=is_measurable,
        base_score_percent=base,
        effective_tokens_ruler=longest(RULER_PERCENT),
        effective_tokens_nolima=longest(NOLIMA_FRACTION * base),
    )


def effective_intervals(cells: Sequence[TaskCell], *, seed: int) -> EffectiveIntervals:
    """95 % of the effective lengths that so many prompts leave possible, by both definitions.

    Each cell's share of right answers is drawn from its Jeffreys posterior, Beta(right + ½,
    wrong + ½) (Brown, Cai and DasGupta 2001, doi:10.1214/ss/1009213286): a cell without a wrong
    answer has an error too. Null where nothing is measurable.
    """
    import numpy as np

    if not effective_lengths(scores_by_length(cells)).is_measurable:
        return EffectiveIntervals(
            effective_tokens_ruler_low=None,
            effective_tokens_ruler_high=None,
            effective_tokens_nolima_low=None,
            effective_tokens_nolima_high=None,
        )
    generator = np.random.default_rng(seed)
    n_prompts = np.array([cell.n_prompts for cell in cells])
    n_right = np.array([cell.n_exact for cell in cells])
    shares = generator.beta(n_right + 0.5, n_prompts - n_right + 0.5, size=(N_DRAWS, len(cells)))
    drawn = [effective_lengths(scores_by_length(cells, share * n_prompts)) for share in shares]

    def interval(lengths: Sequence[int | None]) -> tuple[int, int]:
        low, high = np.percentile(
            np.array(lengths, dtype=int), INTERVAL_PERCENT, method="closest_observation"
        )
        return int(low), int(high)

    ruler = interval([one.effective_tokens_ruler for one in drawn])
    nolima = interval([one.effective_tokens_nolima for one in drawn])
    return EffectiveIntervals(
        effective_tokens_ruler_low=ruler[0],
        effective_tokens_ruler_high=ruler[1],
        effective_tokens_nolima_low=nolima[0],
        effective_tokens_nolima_high=nolima[1],
    )


def long_gain(
    model: LogitModel, documents: Iterable[Document], context_tokens: int, settings: ContextSettings
) -> LongGain:
    """Loss with `short_tokens` of context less that with all, of supervised tokens beyond them.

    Args:
        documents: of the test split; the first that are longer than `short_tokens` count.
        context_tokens: all that the link is given.
    """
    import numpy as np

    from workflow_scripts.scoring.likelihood import score_documents
    from workflow_scripts.scoring.ratio import ratio

    short_tokens = settings.short_tokens
    long = [
        document
        for document in documents
        if len(document.input_ids) > short_tokens
        and document.is_supervised[short_tokens:context_tokens].any()
    ][: settings.n_long_conversations]
    if not long:
        return LongGain(
            short_tokens=short_tokens,
            n_long_conversations=0,
            long_gain_nats_per_token=None,
            long_gain_standard_error_nats_per_token=None,
        )
    short, whole = (
        score_documents(model, cutting.cut(long, piece_tokens=piece_tokens))
        for piece_tokens in (short_tokens, context_tokens)
    )
    sums, counts = [], []
    for number, document in enumerate(long):
        positions = np.flatnonzero(document.is_supervised[1:]) + 1
        beyond = (positions >= short_tokens) & (positions < context_tokens)
        sums.append(float((short[number] - whole[number])[beyond].sum()))
        counts.append(int(beyond.sum()))
    gain = ratio(np.array(sums), np.array(counts))
    return LongGain(
        short_tokens=short_tokens,
        n_long_conversations=len(long),
        long_gain_nats_per_token=gain.mean,
        long_gain_standard_error_nats_per_token=gain.standard_error,
        n_long_tokens=sum(counts),
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
