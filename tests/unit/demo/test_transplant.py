from __future__ import annotations

import pytest
import torch

from workflow_scripts.demo import smollm2, smollm2_wheel, transplant
from workflow_scripts.models import tokenizer_files


@pytest.fixture(scope="module")
def pieces():
    return transplant.read_pieces(tokenizer_files.official_v3())


@pytest.fixture(scope="module")
def published():
    return smollm2.read(smollm2_wheel.unpacked(smollm2_wheel.GGUF))


@pytest.fixture(scope="module")
def rows(pieces, published):
    own = published.weights["model.embed_tokens.weight"]
    return transplant.rows_of(pieces, own, published.tokenizer)


def test_the_texts_of_the_pieces_make_up_the_text(pieces):
    """The concatenated texts of the tokens of a text equal the text."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer_files.official_v3()))
    text = "Return x[0]\n\tif a < b:  # größe, 1234 tokens\n"
    found = "".join(pieces[token].text or "" for token in model.encode(text))
    assert found == " " + text  # SentencePiece begins every text with a space


def test_bytes_of_longer_characters_and_of_other_pieces_have_no_text(pieces):
    by_name = {piece.name: piece.text for piece in pieces}
    assert by_name["<0x0A>"] == "\n"
    assert by_name["<0x41>"] is None and by_name["A"] == "A"
    assert by_name["<0xC3>"] is None
    assert by_name["[INST]"] is None and by_name["<unk>"] is None


def test_a_piece_that_is_also_a_token_keeps_its_row(pieces, published, rows):
    own = published.weights["model.embed_tokens.weight"]
    names = [piece.name for piece in pieces]
    for name, token in (("▁the", "Ġthe"), ("7", "7"), ("<0x0A>", "Ċ"), ("</s>", "<|im_end|>")):
        expected = own[published.tokenizer.token_to_id(token)]
        assert torch.equal(rows[names.index(name)], expected)


def test_a_piece_without_text_has_a_zero_row(pieces, rows):
    names = [piece.name for piece in pieces]
    for name in ("<0x41>", "<0xC3>", "<unk>", "[AVAILABLE_TOOLS]"):
        assert not rows[names.index(name)].any()


def test_another_piece_has_the_shortened_mean_of_its_tokens(pieces, published, rows):
    own = published.weights["model.embed_tokens.weight"]
    several = [
        (row, ids)
        for row, piece in zip(rows, pieces, strict=True)
        if piece.text and len(ids := published.tokenizer.encode(piece.text).ids) > 1
    ]
    assert 5_000 < len(several) < 15_000
    for row, ids in several[::500]:
        assert torch.allclose(row, 0.85 * own[ids].mean(dim=0))
