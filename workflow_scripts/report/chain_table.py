"""Table of the perplexities of every link, with the change at each hand-over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from workflow_scripts import log
from workflow_scripts.report.results import Link, RunResults
from workflow_scripts.report.tables import (
    Table,
    change_of_perplexity,
    digits_of,
    mebibytes,
    perplexity,
    with_error,
)
from workflow_scripts.scoring.token_scores import TokenScores

# Weights per block of a k-quant (QK_K in llama.cpp).
K_QUANT_BLOCK = 256


def chain(runs: Sequence[RunResults]) -> Table:
    """One row per run and link, and one column per text."""
    texts = list(dict.fromkeys(text for run in runs for text in run.link("merged").texts))
    rows = []
    for run in runs:
        for link, step in zip(run.links, steps(run), strict=True):
            rows.append(
                [
                    f"{run.name}: {link.name}",
                    perplexity(link.scores),
                    step,
                    *diverged(link),
                    *(perplexity(link.texts[text]) if text in link.texts else "" for text in texts),
                    *measured(link),
                ]
            )
    scores = runs[0].links[0].scores
    return Table(
        title="Chain of perplexities",
        note=(
            f"Every link scores the same {scores.n_scored_tokens:,} supervised tokens of the"
            f" same {scores.n_conversations} test conversations, in pieces of at most"
            f" {scores.piece_tokens} tokens. Lower perplexity is better; ± is a standard error."
            " “vs. its source” is the change of perplexity from the link that this one is made"
            " from: F16 for a quantization, the merged model for AWQ, and otherwise the line above."
            " Its error is paired token by token, which cancels differences in how hard the texts"
            " are. A change smaller than twice its error is not significant. The KL divergence of a"
            " quantization to F16, and the percentage of tokens for which both predict the same"
            " most likely token, are measured on the same tokens. “Whole conversations” is the"
            " perplexity without cutting into pieces, for the links that apply the sliding window."
            f"{note_on_widths(runs)}{note_on_texts(runs, texts)}"
        ),
        header=[
            "Link",
            "Perplexity",
            "vs. its source, %",
            "KL divergence to F16, nats",
            "Same top token as F16, %",
            *(f"Perplexity, {text}" for text in texts),
            "Whole conversations",
            "Prompt ms/token",
            "Decode ms/token",
            "Peak memory",
            "Size",
        ],
        rows=rows,
    )


def note_on_widths(runs: Sequence[RunResults]) -> str:
    """Explanation for models whose width rules the k-quants out."""
    widths = {
        run.settings.model: run.facts.hidden_size
        for run in runs
        if run.facts.hidden_size % K_QUANT_BLOCK
    }
    return "".join(
        f" The rows of {model} have {width:,} weights. llama.cpp's k-quants (such as Q4_K_M) need a"
        f" multiple of {K_QUANT_BLOCK}; it would store most of this model in other types. Q8_0,"
        " Q5_0 and Q4_0 need only a multiple of 32."
        for model, width in widths.items()
    )


def note_on_texts(runs: Sequence[RunResults], texts: Sequence[str]) -> str:
    """Explanation of the columns of texts."""
    if not texts:
        return ""
    scored = {text: one for run in runs for text, one in run.link("merged").texts.items()}
    sizes = ", ".join(f"{text} {scored[text].n_scored_tokens:,}" for text in texts)
    return (
        f" Texts are scored as llama-perplexity does, on the second half of chunks, {sizes}"
        " tokens; ± is a standard error over chunks."
    )


def steps(run: RunResults) -> Iterator[str]:
    """Change of perplexity of each link from the link it is made from; empty for the base.

    Raises:
        StageError: the two were scored on different tokens.
    """
    for link in run.links:
        if link.source is None:
            yield ""
            continue
        before = run.link(link.source)
        before_scores, link_scores = (TokenScores.read(one.token_scores) for one in (before, link))
        if not link_scores.scores_the_same(before_scores):
            raise log.StageError(
                "two links were scored on different tokens",
                where=f"{link.token_scores}, compared with {before.token_scores}",
                found=f"{len(link_scores.nats)} of {len(link_scores.ids)} conversations",
                expected=f"the same {len(before_scores.nats)} of {len(before_scores.ids)}",
                to_fix="score them again: snakemake evaluate --forcerun evaluate_perplexity"
                " evaluate_quantization",
            )
        yield change_of_perplexity(*link_scores.difference(before_scores))


def diverged(link: Link) -> list[str]:
    """Cells of the KL divergence to F16 and of the agreement on the most likely token."""
    if link.divergence is None:
        return ["", ""]
    kl_error = link.divergence.kl_divergence_standard_error_nats
    error = link.divergence.top1_agreement_standard_error_fraction
    return [
        with_error(link.divergence.kl_divergence_nats, kl_error, digits_of(kl_error, least=4)),
        with_error(
            100 * link.divergence.top1_agreement_fraction,
            None if error is None else 100 * error,
        ),
    ]


def measured(link: Link) -> list[str]:
    """Cells of the full-length perplexity, speed, memory and size."""
    whole = link.scores.full_length_perplexity
    perplexity_of_whole = "" if whole is None else f"{whole:.2f}"
    if link.speed is None:
        return [perplexity_of_whole, "", "", "", mebibytes(link.scores.size_bytes)]
    return [
        perplexity_of_whole,
        with_error(*link.speed.of_token("prompt"), digits=3),
        with_error(*link.speed.of_token("decode"), digits=3),
        mebibytes(link.speed.peak_memory_bytes),
        mebibytes(link.speed.size_bytes),
    ]
