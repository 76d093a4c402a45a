"""Transplant: Mistral's vocabulary for a model that was trained with another tokenizer.

A Mistral piece that is also a token of the model keeps that token's row. This is two thirds of the
vocabulary, and most of any text. Any other piece gets the mean of the rows of the tokens that its
text consists of, shortened. Input embeddings and output layer share their rows, as in SmolLM2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import MistralConfig, MistralForCausalLM

from workflow_scripts.demo.smollm2 import BEGIN_TURN, END_TURN, Smollm2

BOS, EOS, BEGIN_INST, END_INST = "<s>", "</s>", "[INST]", "[/INST]"
# Mistral's control tokens as text of SmolLM2's chat template.
CONTROL_TEXTS = {
    BOS: BEGIN_TURN,
    EOS: END_TURN,
    BEGIN_INST: "user\n",
    END_INST: "assistant\n",
}
MEAN_LENGTH = 0.85
"""Factor on the mean of several rows: as output rows, longer means win too often."""


@dataclass(frozen=True)
class Piece:
    """An entry of a SentencePiece vocabulary."""

    name: str
    """`▁the`, `<0x0A>`, `[INST]`."""
    text: str | None
    """The text of the piece. None for a control token, for a byte of a longer character, and for
    a byte whose character has its own piece."""


def read_pieces(tokenizer_file: Path) -> list[Piece]:
    """Return the vocabulary of a SentencePiece model, by id."""
    model = SentencePieceProcessor(model_file=str(tokenizer_file))
    ids = range(model.get_piece_size())
    names = [model.id_to_piece(i) for i in ids]
    whole = {name for i, name in zip(ids, names, strict=True) if not model.is_byte(i)}
    pieces = []
    for i, name in zip(ids, names, strict=True):
        if model.is_control(i) or model.is_unknown(i) or name in CONTROL_TEXTS:
            text = None
        elif model.is_byte(i):
            code = int(name[3:5], 16)
            text = chr(code) if code < 128 and chr(code) not in whole else None
        else:
            text = name.replace("▁", " ")
        pieces.append(Piece(name, text))
    return pieces


def rows_of(pieces: Iterable[Piece], rows: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Return one row per piece.

    The row of a piece without a text is zero: it adds nothing to an input, and its logit of 0 is
    far below that of any likely token. If a byte piece had the row of its character, it would take
    half of that character's probability.

    Args:
        rows: (tokens, hidden), the rows of the model's own vocabulary.
        tokenizer: the model's own tokenizer.
    Returns:
        (pieces, hidden).
    """
    texts = {piece.name: CONTROL_TEXTS.get(piece.name, piece.text) for piece in pieces}
    found = torch.zeros(len(texts), rows.shape[1])
    for row, ids in zip(found, _encoded(texts, tokenizer), strict=True):
        if ids:
            row.copy_(rows[ids].mean(dim=0) * (MEAN_LENGTH if len(ids) > 1 else 1.0))
    return found


def _encoded(texts: Mapping[str, str | None], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of each text; no ids for None."""
    batch = tokenizer.encode_batch_fast([text or "" for text in texts.values()])
    return [encoding.ids for encoding in batch]


def mistral_of(
    published: Smollm2,
    pieces: Collection[Piece],
    *,
    context_tokens: int,
    sliding_window: int | None,
) -> Any:  # type checkers do not see what `to` of a MistralForCausalLM takes
    """Return the published model as a Mistral with these pieces and this window, in float32."""
    rows = rows_of(pieces, published.weights["model.embed_tokens.weight"], published.tokenizer)
    changes = {
        "vocab_size": len(pieces),
        "max_position_embeddings": context_tokens,
        "sliding_window": sliding_window,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = MistralForCausalLM(MistralConfig(**published.config | changes))
    shared = {"model.embed_tokens.weight": rows, "lm_head.weight": rows}
    model.load_state_dict(published.weights | shared)
    model.tie_weights()
    return model
