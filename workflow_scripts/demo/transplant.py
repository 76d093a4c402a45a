"""Mistral's vocabulary for a model that was trained with another tokenizer.

A piece of Mistral's that is a token of the model's own keeps its row, which holds for two thirds of
the vocabulary and most of any text. Another gets the mean of the tokens that its text is made of,
shortened. Input embeddings and output layer share their rows, as they do in SmolLM2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts.demo.smollm2 import BEGIN_TURN, END_TURN

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

BOS, EOS, BEGIN_INST, END_INST = "<s>", "</s>", "[INST]", "[/INST]"
# The control tokens of chats, in the words of SmolLM2's own chat template.
CONTROL_TEXTS = {
    BOS: BEGIN_TURN,
    EOS: END_TURN,
    BEGIN_INST: "user\n",
    END_INST: "assistant\n",
}
MEAN_LENGTH = 0.85
"""Length of a mean of several rows: as output rows, longer ones win too often."""


@dataclass(frozen=True)
class Piece:
    """An entry of a SentencePiece vocabulary."""

    name: str
    """`▁the`, `<0x0A>`, `[INST]`."""
    text: str | None
    """The text it stands for; None for a control token, and for a byte that is part of a longer
    character or spells one that has a piece of its own."""


def read_pieces(tokenizer_file: Path) -> list[Piece]:
    """The vocabulary of a SentencePiece model, by id."""
    from sentencepiece import SentencePieceProcessor

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
    """A row for every piece.

    Zero for pieces without a text: such a row adds nothing to an input, and its logit of 0 is far
    below that of any token that might follow. A byte piece with the row of its character would take
    half of that character's probability.

    Args:
        rows: (tokens, hidden) of the model's own vocabulary.
        tokenizer: the model's own.
    Returns:
        (pieces, hidden).
    """
    import torch

    texts = {piece.name: CONTROL_TEXTS.get(piece.name, piece.text) for piece in pieces}
    found = torch.zeros(len(texts), rows.shape[1])
    for row, ids in zip(found, _encoded(texts, tokenizer), strict=True):
        if ids:
            row.copy_(rows[ids].mean(dim=0) * (MEAN_LENGTH if len(ids) > 1 else 1.0))
    return found


def _encoded(texts: Mapping[str, str | None], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each text; none for None."""
    batch = tokenizer.encode_batch_fast([text or "" for text in texts.values()])
    return [encoding.ids for encoding in batch]
