"""Rows for the validation loss of training, with the tokens that `evaluate_perplexity` scores.

Documents are cut into the pieces that the chain scores. The pieces are packed whole and attention
does not cross them, whatever the recipe does in training, so the loss here and the perplexity there
agree.
"""

from __future__ import annotations

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.packing.packing import Piece, Pieces, Rows, best_fit
from workflow_scripts.scoring.pieces import comparable_tokens, stretches
from workflow_scripts.tokens.documents import Documents


def validation_rows(
    validation: Documents,
    facts: ModelShape,
    *,
    row_tokens: int,
    n_conversations: int | None = None,
) -> Rows:
    """Rows of whole pieces; every supervised token counts once.

    Args:
        facts: the model's facts, for its window and context.
        row_tokens: length of a row of training; rows here are as long as the longest piece if that
            is longer.
        n_conversations: use only the first `n_conversations`; None uses all.
    """
    piece_tokens = comparable_tokens(facts, None)
    n_documents = len(validation) if n_conversations is None else n_conversations
    pieces = Pieces.listed(
        Piece(number, start, end - start, n_context)
        for number, n_tokens in enumerate(validation.lengths[:n_documents].tolist())
        for start, end, n_context in stretches(n_tokens, piece_tokens)
    )
    longest = int(pieces.length.max(initial=0))
    return best_fit(pieces, row_tokens=max(row_tokens, longest), seed=0)
