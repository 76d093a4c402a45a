"""Long documents: split, truncate, drop or refuse those that do not fit into a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from workflow_scripts.log import StageError
from workflow_scripts.packing.packing import Piece, Pieces, Rows
from workflow_scripts.packing.splitting import Cut, TokenEnds, split
from workflow_scripts.settings import PackingSettings
from workflow_scripts.tokens.documents import Documents

NOWHERE = np.zeros(0, dtype=np.int64)
COUNTS = (
    "n_documents_split",
    "n_documents_truncated",
    "n_documents_dropped",
    "n_cuts_at_turn",
    "n_cuts_at_sentence",
    "n_cuts_at_token",
    "n_pieces_without_supervision",  # left out, because no token in them is supervised
    "n_tokens_left_out",
)


def fit(
    documents: Documents,
    settings: PackingSettings,
    read_token_ends: Callable[[], TokenEnds] | None = None,
) -> tuple[Pieces, Counter[str]]:
    """Return the documents as pieces that fit into a row, and what was changed, by `COUNTS`.

    Args:
        read_token_ends: reads the vocabulary; called only if a document must be split. None splits
            without regard to turns and sentences.
    Raises:
        StageError: `long_documents` is `error`, and a document is longer than a row.
    """
    counts: Counter[str] = Counter()
    is_long = documents.lengths > settings.row_tokens
    whole = Pieces.whole(documents.lengths)
    long = np.flatnonzero(is_long)
    if not len(long):
        return whole, counts
    if settings.long_documents == "error":
        shown = "\n            ".join(
            f"{documents[at].id}: {documents.lengths[at]} tokens" for at in long[:10]
        )
        raise StageError(
            f"{len(long)} documents are longer than a row",
            where=shown,
            expected=f"at most {settings.row_tokens} tokens (packings.<name>.row_tokens)",
            to_fix="raise row_tokens, or set packings.<name>.long_documents: split",
        )
    parts: list[Piece] = []
    if settings.long_documents == "drop":
        counts["n_documents_dropped"] = len(long)
        counts["n_tokens_left_out"] = int(documents.lengths[long].sum())
    elif settings.long_documents == "truncate":
        counts["n_documents_truncated"] = len(long)
        parts = [Piece(int(at), 0, settings.row_tokens) for at in long]
        counts["n_tokens_left_out"] = int((documents.lengths[long] - settings.row_tokens).sum())
    else:
        counts["n_documents_split"] = len(long)
        ends = read_token_ends() if read_token_ends else None
        for at in long.tolist():
            pieces, cuts = _split(documents, at, settings, ends)
            parts += pieces
            counts.update(f"n_cuts_at_{kind}" for kind in cuts)
    learned = [part for part in parts if _n_supervised(documents, part)]
    counts["n_pieces_without_supervision"] = len(parts) - len(learned)
    counts["n_tokens_left_out"] += sum(
        part.length - part.n_context for part in set(parts) - set(learned)
    )
    short = whole.take(np.flatnonzero(~is_long))
    return short.joined(Pieces.listed(learned)), counts


def _split(
    documents: Documents, at: int, settings: PackingSettings, ends: TokenEnds | None
) -> tuple[list[Piece], list[Cut]]:
    input_ids = documents[at].input_ids
    parts, cuts = split(
        input_ids,
        row_tokens=settings.row_tokens,
        overlap_tokens=settings.context_tokens,
        turn_ends=ends.turn_ends(input_ids) if ends else NOWHERE,
        sentence_ends=ends.sentence_ends(input_ids) if ends else NOWHERE,
    )
    return [Piece(at, *part) for part in parts], cuts


def _n_supervised(documents: Documents, piece: Piece, n_unlearned: int = 1) -> int:
    """Count the tokens of a piece that the loss counts.

    Args:
        n_unlearned: number of leading tokens that have no prediction.
    """
    first = piece.start + max(piece.n_context, n_unlearned)
    return int(documents[piece.document].is_supervised[first : piece.start + piece.length].sum())


def supervised_tokens(documents: Documents, rows: Rows, *, crosses_documents: bool) -> np.ndarray:
    """Return (rows,) int32: tokens of each row that the loss counts.

    Args:
        crosses_documents: a document's first token is predicted from the document before it.
    """
    pieces = rows.pieces
    # For whole documents the count is in the file; BOS, the first token, is never supervised.
    counted = documents.n_supervised[pieces.document].astype(np.int64)
    begins_row = np.zeros(pieces.n_pieces, dtype=bool)
    begins_row[rows.first_piece[:-1]] = True
    for at in np.flatnonzero(pieces.length != documents.lengths[pieces.document]).tolist():
        (piece,) = Rows(pieces.take(np.array([at])), np.array([0, 1]))[0]
        is_unpredicted = begins_row[at] or not crosses_documents
        counted[at] = _n_supervised(documents, piece, n_unlearned=int(is_unpredicted))
    return rows.sum_pieces(counted).astype(np.int32)
