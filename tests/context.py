"""Records of usable context and recall for tests."""

from __future__ import annotations

from collections.abc import Sequence

from workflow_scripts.handover.context import Cell, ContextScores, LengthScore, TaskCell


def cell_of(length_tokens: int, depth_fraction: float | None, n_exact: int, n_prompts: int) -> Cell:
    """A cell with this share of right answers; its intervals and nats are made up."""
    share = n_exact / n_prompts
    return Cell(
        length_tokens=length_tokens,
        depth_fraction=depth_fraction,
        n_prompts=n_prompts,
        n_exact=n_exact,
        exact_fraction=share,
        exact_low_fraction=share,
        exact_high_fraction=share,
        nats_per_answer=5.0,
        standard_error_nats_per_answer=0.5,
    )


def context_scores(scores: Sequence[int], **more: object) -> ContextScores:
    """Record of evaluate_context with these scores at 512, 1024 … tokens.

    Args:
        more: other values of `ContextScores`.
    """
    lengths = [512 << number for number in range(len(scores))]
    is_measurable = scores[0] > 0
    cells = tuple(
        TaskCell(task="single", **dict(cell_of(length, depth, score // 10, 10)))
        for length, score in zip(lengths, scores, strict=True)
        for depth in (0.0, 1.0)
    )
    found = ContextScores(
        advertised_tokens=32_768,
        context_tokens=4096,
        sliding_window=None,
        cells=cells,
        scores=tuple(
            LengthScore(length_tokens=length, score_percent=score)
            for length, score in zip(lengths, scores, strict=True)
        ),
        n_prompts=10 * len(cells),
        is_measurable=is_measurable,
        base_score_percent=max(scores),
        effective_tokens_ruler=1024 if is_measurable else None,
        effective_tokens_nolima=2048 if is_measurable else None,
        effective_tokens_ruler_low=512 if is_measurable else None,
        effective_tokens_ruler_high=2048 if is_measurable else None,
        effective_tokens_nolima_low=1024 if is_measurable else None,
        effective_tokens_nolima_high=2048 if is_measurable else None,
        short_tokens=256,
        n_long_conversations=9,
        long_gain_nats_per_token=None,
        long_gain_standard_error_nats_per_token=None,
        n_long_tokens=900,
        duration_seconds=1.5,
    )
    return found.changed(**more)
