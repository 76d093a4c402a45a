"""What a packing plan achieves, as parts of a page: rows, cost, histograms and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from workflow_scripts import pages
from workflow_scripts.handover.packing import PackingReport
from workflow_scripts.packing.packing import Row
from workflow_scripts.packing.plan import Plan
from workflow_scripts.report.histograms import histogram_svg, length_edges
from workflow_scripts.report.masks import Stretch, mask_svg
from workflow_scripts.tokens.documents import Documents

N_FILL_BARS = 20


STRATEGY_TEXTS = {
    "best_fit": "Documents stay whole and apart: each goes to the fullest row that still holds it.",
    "concatenate": "Documents lie end to end and are cut where a row ends; attention runs on from"
    " one to the next.",
    "none": "A row holds one document; rows that share a micro-batch are padded to the longest.",
}


def rows_html(report: PackingReport) -> str:
    """What was placed, and what became of documents too long for a row."""
    n_tokens, n_rows = report.n_tokens, report.n_rows
    n_empty = n_rows * report.row_tokens - n_tokens
    # Rows of one document are not filled up to a row's length, but to their micro-batch's longest.
    empty = "" if report.strategy == "none" else f" ({pages.counted(n_empty, 'token')} empty)"
    placed = {
        "strategy": report.strategy,
        "rows": f"{n_rows:,} of at most {report.row_tokens:,} tokens",
        "fill": f"{report.fill_fraction:.3%}{empty}",
        "documents": f"{report.n_documents:,}",
        "placed, copies counted": f"{report.n_documents_placed:,}",
        "in several pieces": f"{report.n_documents_cut:,}",
        "pieces": f"{report.n_pieces:,}",
        "tokens": f"{n_tokens:,}",
        "supervised": counted_share(report.n_supervised_tokens, n_tokens),
        "context, seen again": counted_share(report.n_context_tokens, n_tokens),
    }
    window = report.sliding_window
    if window:
        placed[f"documents beyond the window of {window:,}"] = (
            f"{report.n_documents_beyond_window:,}"
        )
    if report.strategy == "concatenate":  # which cuts every document alike
        return pages.facts(placed)
    cuts = (report.n_cuts_at_turn, report.n_cuts_at_sentence, report.n_cuts_at_token)
    too_long = {
        "split": f"{report.n_documents_split:,}",
        "cut at a turn, a sentence, elsewhere": ", ".join(f"{n:,}" for n in cuts),
        "truncated": f"{report.n_documents_truncated:,}",
        "dropped": f"{report.n_documents_dropped:,}",
        "tokens left out": f"{report.n_tokens_left_out:,}",
        "pieces left out, nothing to learn": f"{report.n_pieces_without_supervision:,}",
    }
    return (
        f"{pages.facts(placed)}\n<p>Documents longer than a row, and what is not learned:</p>"
        f"{pages.facts(too_long)}"
    )


def counted_share(n: int, whole: int) -> str:
    return f"{n:,} ({pages.share(n, whole)})"


def cost_html(report: PackingReport) -> str:
    """What an epoch computes, against one document a row and rows in random order."""
    padding = [
        measured(fraction, ".1%")
        for fraction in (report.none_padding_fraction, report.none_random_order_padding_fraction)
    ]
    imbalance = [
        measured(ratio, ".3f")
        for ratio in (report.step_imbalance_8_ranks, report.step_imbalance_8_ranks_random_order)
    ]
    return pages.facts(
        {
            "operations an epoch": f"{report.training_flops:.3g} FLOP",
            "attention’s share of them": measured(report.attention_flops_fraction, ".1%"),
            "padding of unpacked micro-batches of 8": f"{padding[0]} grouped by length,"
            f" {padding[1]} in random order",
            "costliest of 8 ranks over their mean": f"{imbalance[0]} balanced,"
            f" {imbalance[1]} in random order",
        }
    )


def measured(value: float | None, form: str) -> str:
    """A number, or a dash where there was too little to measure it on."""
    return "–" if value is None else format(value, form)


def histograms_html(plan: Plan, documents: Documents, window: int | None) -> str:
    """Lengths of the documents, and fill of the rows."""
    marks = {f"row {plan.row_tokens:,}": plan.row_tokens}
    if window:
        marks[f"window {window:,}"] = window
    lengths = documents.lengths
    edges = length_edges(
        min(int(lengths.min()), *marks.values()), max(int(lengths.max()), *marks.values())
    )
    length_counts, _ = np.histogram(lengths, bins=edges)
    octaves = [edge for edge in edges if edge.bit_count() == 1]
    lengths_svg = histogram_svg(
        edges,
        length_counts.tolist(),
        axis="tokens of a document",
        # At most eight have room; from the longest down, as the marks are there.
        ticks={edge: f"{edge:,}" for edge in octaves[:: -math.ceil(len(octaves) / 8)]},
        marks=marks,
        names=[
            f"{start:,} to {end - 1:,} tokens" for start, end in zip(edges, edges[1:], strict=False)
        ],
        scale=math.log2,
    )
    fill = plan.rows.n_tokens * N_FILL_BARS // plan.row_tokens  # full rows in the last bar
    fill_counts = np.bincount(np.minimum(fill, N_FILL_BARS - 1), minlength=N_FILL_BARS)
    percents = [100 * bar // N_FILL_BARS for bar in range(N_FILL_BARS + 1)]
    fill_svg = histogram_svg(
        percents,
        fill_counts.tolist(),
        axis=f"fill of a row, % of {plan.row_tokens:,} tokens",
        ticks={percent: f"{percent}" for percent in range(0, 101, 20)},
        marks={},
        names=[
            f"{start} to {end} % full" for start, end in zip(percents, percents[1:], strict=False)
        ],
    )
    return (
        '<div class="drawings">'
        f"<figure>{lengths_svg}<figcaption>Documents by length</figcaption></figure>"
        f"<figure>{fill_svg}<figcaption>Rows by fill</figcaption></figure></div>"
    )


def masks_html(plan: Plan, documents: Documents, layer_windows: Sequence[int | None]) -> str:
    """A few rows, each with the mask of attention and its supervised tokens."""
    windows = [window for window in layer_windows if window is not None]
    window = min(windows, default=None)
    shown = shown_rows(plan)
    extent_tokens = max(int(plan.rows.n_tokens[row]) for row in shown)
    figures = "".join(
        mask_html(plan, documents, row, why, window=window, extent_tokens=extent_tokens)
        for row, why in shown.items()
    )
    n_narrow = sum(one == window for one in windows)
    layers = (
        f" Drawn is the window of {n_narrow:,} of {len(layer_windows):,} layers; the others see"
        " further."
        if 0 < n_narrow < len(layer_windows)
        else ""
    )
    return (
        "<p>A colored point is a pair of tokens: the one on the left (query) sees the one above"
        f" (key). Nothing sees what comes after it, so the upper right is empty.{layers} Point at a"
        f" document for its name.</p>{legend_html(plan, window)}"
        f'<div class="drawings">{figures}</div>'
    )


def shown_rows(plan: Plan) -> dict[int, str]:
    """Up to three rows, and why each is shown."""
    pairs, n_pieces = plan.attention_pairs, np.diff(plan.rows.first_piece)
    longest = int(plan.rows.row_of_piece[plan.rows.pieces.length.argmax()])
    reasons = {int(np.abs(pairs - np.median(pairs)).argmin()): ["median cost of attention"]}
    if n_pieces.max() > 1:
        reasons.setdefault(int(n_pieces.argmax()), []).append("most pieces")
    reasons.setdefault(longest, []).append("longest piece")
    return {row: ", ".join(reason) for row, reason in reasons.items()}


def mask_html(
    plan: Plan,
    documents: Documents,
    number: int,
    why: str,
    *,
    window: int | None,
    extent_tokens: int,
) -> str:
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
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def learned_tokens(row: Row, documents: Documents, *, crosses_documents: bool) -> np.ndarray:
    """(tokens,) bool of a row: what the loss counts; nothing predicts the first of a segment."""
    parts: list[np.ndarray] = []
    for piece in row:
        stretch = slice(piece.start, piece.start + piece.length)
        is_supervised = documents[piece.document].is_supervised[stretch].copy()
        is_supervised[: piece.n_context] = False
        if not crosses_documents or not parts:
            is_supervised[0] = False
        parts.append(is_supervised)
    return np.concatenate(parts)


def legend_html(plan: Plan, window: int | None) -> str:
    within = f" and at most {window - 1:,} tokens back" if window else ""
    entries = {
        "one": "",
        "next": f"seen: the same document{within}; colors alternate between documents",
    }
    if window:
        entries["beyond"] = "the same document, but out of the window"
    if plan.crosses_documents:
        entries["across"] = "seen, though it is another document"
    if plan.rows.pieces.n_context.any():
        entries["one context"] = "context, repeated from the piece before: not learned"
    entries["learned"] = "supervised: the loss counts the prediction of this token"
    items = []
    swatches = ""
    for kind, text in entries.items():
        swatches += f'<span class="swatch {kind}"></span>'
        if text:
            items.append(f"<li>{swatches} {text}</li>")
            swatches = ""
    return f'<ul class="legend">{"".join(items)}</ul>'
