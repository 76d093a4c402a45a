"""The page on a packing plan: rows, cost, lengths and masks."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from workflow_scripts import pages
from workflow_scripts.handover.packing import PackingReport
from workflow_scripts.packing.packing import Row
from workflow_scripts.packing.plan import Plan
from workflow_scripts.report.bars import Bar, range_bars
from workflow_scripts.report.masks import Stretch, mask_svg
from workflow_scripts.tokens.documents import Documents

N_FILL_BARS = 20


def page(
    plan: Plan,
    report: PackingReport,
    documents: Documents,
    layer_windows: Sequence[int | None],
    *,
    source: str,
) -> str:
    """The whole page, as HTML.

    Args:
        layer_windows: keys that a query sees in each layer; None is full causal attention.
        source: path of the plan, for display.
    """
    windows = [window for window in layer_windows if window is not None]
    window = min(windows, default=None)
    return pages.render(
        "packing.html.j2",
        strategy=plan.strategy,
        source=source,
        placed=placed(report),
        too_long=too_long(report),
        costs=costs(report),
        n_documents=len(documents),
        lengths=length_bars(documents.lengths, plan.row_tokens, report.sliding_window),
        row_tokens=plan.row_tokens,
        n_rows=len(plan.rows),
        fills=fill_bars(plan),
        window=window,
        n_narrow=sum(one == window for one in windows),
        n_layers=len(layer_windows),
        crosses_documents=plan.crosses_documents,
        repeats_context=bool(plan.rows.pieces.n_context.any()),
        masks=masks(plan, documents, window),
    )


def placed(report: PackingReport) -> dict[str, str]:
    """Facts about the rows."""
    n_empty = report.n_rows * report.row_tokens - report.n_tokens
    # Rows of one document are padded to the longest row of their micro-batch, not to `row_tokens`.
    empty = "" if report.strategy == "none" else f" ({pages.counted(n_empty, 'token')} empty)"
    facts = {
        "strategy": report.strategy,
        "rows": f"{report.n_rows:,} of at most {report.row_tokens:,} tokens",
        "fill": f"{report.fill_fraction:.3%}{empty}",
        "documents": f"{report.n_documents:,}",
        "placed, copies counted": f"{report.n_documents_placed:,}",
        "in several pieces": f"{report.n_documents_cut:,}",
        "pieces": f"{report.n_pieces:,}",
        "tokens": f"{report.n_tokens:,}",
        "supervised": counted_share(report.n_supervised_tokens, report.n_tokens),
        "repeated as context": counted_share(report.n_context_tokens, report.n_tokens),
    }
    if report.sliding_window:
        name = f"documents longer than the window of {report.sliding_window:,}"
        facts[name] = f"{report.n_documents_beyond_window:,}"
    return facts


def too_long(report: PackingReport) -> dict[str, str]:
    """Facts about documents longer than a row; empty for `concatenate`, which cuts all alike."""
    if report.strategy == "concatenate":
        return {}
    cuts = (report.n_cuts_at_turn, report.n_cuts_at_sentence, report.n_cuts_at_token)
    return {
        "split": f"{report.n_documents_split:,}",
        "cut at a turn, a sentence, elsewhere": ", ".join(f"{n:,}" for n in cuts),
        "truncated": f"{report.n_documents_truncated:,}",
        "dropped": f"{report.n_documents_dropped:,}",
        "tokens left out": f"{report.n_tokens_left_out:,}",
        "pieces left out, no supervised token": f"{report.n_pieces_without_supervision:,}",
    }


def counted_share(n: int, whole: int) -> str:
    return f"{n:,} ({pages.share(n, whole)})"


def costs(report: PackingReport) -> dict[str, str]:
    """Cost of an epoch, compared with one document per row and with rows in random order."""
    padding = [
        measured(fraction, ".1%")
        for fraction in (report.none_padding_fraction, report.none_random_order_padding_fraction)
    ]
    imbalance = [
        measured(ratio, ".3f")
        for ratio in (report.step_imbalance_8_ranks, report.step_imbalance_8_ranks_random_order)
    ]
    return {
        "operations per epoch": f"{report.training_flops:.3g} FLOP",
        "of these in attention": measured(report.attention_flops_fraction, ".1%"),
        "padding without packing, micro-batches of 8": f"{padding[0]} grouped by length,"
        f" {padding[1]} in random order",
        "cost of the slowest of 8 processes ÷ mean": f"{imbalance[0]} balanced,"
        f" {imbalance[1]} in random order",
    }


def measured(value: float | None, form: str) -> str:
    """A number, or a dash where there was too little data to measure it."""
    return "–" if value is None else format(value, form)


def length_bars(lengths: np.ndarray, row_tokens: int, window: int | None) -> list[Bar]:
    """Documents by length, with a remark on those that exceed the window or a row."""
    limits = {window: "longer than the window"} if window else {}
    limits[row_tokens] = "longer than a row"
    edges = length_edges(int(lengths.min()), int(lengths.max()), limits)
    counts, _ = np.histogram(lengths, bins=edges)
    bars = range_bars(edges, counts.tolist())
    labelled = []
    for first, bar in zip(edges, bars, strict=False):  # no range at either end is empty
        exceeded = max((limit for limit in limits if limit < first), default=None)
        remark = f", {limits[exceeded]}" if exceeded else ""
        labelled.append(bar._replace(label=bar.label + remark))
    return labelled


def length_edges(shortest: int, longest: int, limits: Iterable[int] = ()) -> list[int]:
    """First lengths of ranges that span half an octave and end at a power of two or its half step.

    Args:
        shortest, longest: lengths to cover, tokens; 1 or more.
        limits: lengths at which a range must end too.
    """
    ends = {0, *limits, *(math.ceil(2 ** (power / 2)) for power in range(64))}
    edges = sorted(end + 1 for end in ends)
    return edges[bisect.bisect(edges, shortest) - 1 : bisect.bisect(edges, longest) + 1]


def fill_bars(plan: Plan) -> list[Bar]:
    """Rows by the share of their tokens that is used, in steps of 5 %, without empty steps."""
    fill = plan.rows.n_tokens * N_FILL_BARS // plan.row_tokens
    # Full rows are counted in the last bar.
    counts = np.bincount(np.minimum(fill, N_FILL_BARS - 1), minlength=N_FILL_BARS).tolist()
    step = 100 // N_FILL_BARS
    return [Bar(f"{step * at} – {step * (at + 1)} % full", n) for at, n in enumerate(counts) if n]


class Mask(NamedTuple):
    """Attention mask of a row."""

    drawing: Markup
    caption: str


def masks(plan: Plan, documents: Documents, window: int | None) -> list[Mask]:
    """The masks of a few rows, all to one scale."""
    shown = shown_rows(plan)
    extent_tokens = max(int(plan.rows.n_tokens[row]) for row in shown)
    return [
        mask(plan, documents, row, why, window=window, extent_tokens=extent_tokens)
        for row, why in shown.items()
    ]


def shown_rows(plan: Plan) -> dict[int, str]:
    """Up to three rows, with the reason why each is shown."""
    pairs, n_pieces = plan.attention_pairs, np.diff(plan.rows.first_piece)
    longest = int(plan.rows.row_of_piece[plan.rows.pieces.length.argmax()])
    reasons = {int(np.abs(pairs - np.median(pairs)).argmin()): ["median cost of attention"]}
    if n_pieces.max() > 1:
        reasons.setdefault(int(n_pieces.argmax()), []).append("most pieces")
    reasons.setdefault(longest, []).append("longest piece")
    return {row: ", ".join(reason) for row, reason in reasons.items()}


def mask(
    plan: Plan,
    documents: Documents,
    number: int,
    why: str,
    *,
    window: int | None,
    extent_tokens: int,
) -> Mask:
    row = plan.rows[number]
    stretches, start = [], 0
    for piece in row:
        end = start + piece.length
        name = (
            f"{documents[piece.document].id}, tokens {piece.start:,} to"
            f" {piece.start + piece.length - 1:,}"
        )
        stretches.append(Stretch(start, end, piece.n_context, name))
        start = end
    is_supervised = learned_tokens(row, documents, crosses_documents=plan.crosses_documents)
    caption = (
        f"Row {number + 1:,}, {why}: {pages.counted(len(row), 'piece')},"
        f" {start:,} of {plan.row_tokens:,} tokens,"
        f" {pages.share(int(is_supervised.sum()), start)} supervised"
    )
    drawing = mask_svg(
        stretches,
        is_supervised,
        window=window,
        crosses_documents=plan.crosses_documents,
        extent_tokens=extent_tokens,
        label=f"Attention mask. {caption}",
    )
    return Mask(drawing, caption)


def learned_tokens(row: Row, documents: Documents, *, crosses_documents: bool) -> np.ndarray:
    """(tokens,) bool of a row: True for the tokens that the loss counts.

    The first token of a segment is never counted, because nothing predicts it.
    """
    parts: list[np.ndarray] = []
    for piece in row:
        stretch = slice(piece.start, piece.start + piece.length)
        is_supervised = documents[piece.document].is_supervised[stretch].copy()
        is_supervised[: piece.n_context] = False
        if not crosses_documents or not parts:
            is_supervised[0] = False
        parts.append(is_supervised)
    return np.concatenate(parts)
