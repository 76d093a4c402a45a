from __future__ import annotations

import numpy as np
import pytest

from workflow_scripts.log import StageError
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.packing.long_documents import fit, supervised_tokens
from workflow_scripts.packing.packing import Piece, Rows, best_fit, concatenate
from workflow_scripts.packing.splitting import TokenEnds
from workflow_scripts.settings import PackingSettings
from workflow_scripts.tokens.documents import Documents

ROW_TOKENS = 256


@pytest.fixture(scope="module")
def documents(prepared) -> Documents:
    documents = Documents(prepared.tokens / "train.arrow")
    assert 3 <= (documents.lengths > ROW_TOKENS).sum() < len(documents) / 2
    return documents


@pytest.fixture(scope="module")
def token_ends(tokenizer_v3) -> TokenEnds:
    official = load_mistral_tokenizer(tokenizer_v3, for_training=True)
    return TokenEnds.of(official.instruct_tokenizer.tokenizer)


def listed(pieces):
    rows = Rows(pieces, np.arange(pieces.n_pieces + 1))
    return [piece for row in rows for piece in row]


def settings(**options):
    return PackingSettings(row_tokens=ROW_TOKENS, **options)


@pytest.mark.parametrize("reads_text", [True, False], ids=["at ends", "anywhere"])
def test_split_pieces_contain_every_supervised_token_once(documents, token_ends, reads_text):
    pieces, changes = fit(documents, settings(), (lambda: token_ends) if reads_text else None)
    learned = [np.zeros(length, dtype=int) for length in documents.lengths]
    for piece in listed(pieces):
        assert piece.length <= ROW_TOKENS
        new = slice(piece.start + piece.n_context, piece.start + piece.length)
        learned[piece.document][new] += 1
    n_left_out = 0
    for document, counts in zip(documents, learned, strict=True):
        assert counts.max() == 1
        assert counts[document.is_supervised].all()
        n_left_out += (counts == 0).sum()
    assert changes["n_tokens_left_out"] == n_left_out
    assert changes["n_documents_split"] == (documents.lengths > ROW_TOKENS).sum()
    n_cuts = [changes[f"n_cuts_at_{kind}"] for kind in ("turn", "sentence", "token")]
    n_pieces = pieces.n_pieces + changes["n_pieces_without_supervision"]
    assert sum(n_cuts) == n_pieces - len(documents)
    assert (n_cuts[1] > 0) == reads_text


def test_a_piece_without_supervised_tokens_is_left_out(write_documents, tmp_path):
    tokens = [[1, *range(10, 309)]]
    documents = write_documents(tmp_path / "t.arrow", tokens, [[(280, 300)]])
    pieces, changes = fit(documents, PackingSettings(row_tokens=128, overlap_tokens=28))
    assert listed(pieces) == [Piece(0, 200, 100, 28)]
    assert changes["n_pieces_without_supervision"] == 2
    assert changes["n_tokens_left_out"] == 228


def test_truncated_documents_keep_their_beginning(documents):
    pieces, changes = fit(documents, settings(long_documents="truncate"))
    is_long = documents.lengths > ROW_TOKENS
    assert changes["n_documents_truncated"] == is_long.sum()
    assert changes["n_tokens_left_out"] == (documents.lengths[is_long] - ROW_TOKENS).sum()
    expected = np.minimum(documents.lengths, ROW_TOKENS)
    assert sorted(listed(pieces)) == [Piece(at, 0, n) for at, n in enumerate(expected)]


def test_dropped_documents_are_counted(documents):
    pieces, changes = fit(documents, settings(long_documents="drop"))
    is_long = documents.lengths > ROW_TOKENS
    assert changes["n_documents_dropped"] == is_long.sum()
    assert changes["n_tokens_left_out"] == documents.lengths[is_long].sum()
    kept = np.flatnonzero(~is_long)
    assert listed(pieces) == [Piece(at, 0, documents.lengths[at]) for at in kept]


def test_an_error_names_the_documents_and_the_remedy(documents):
    with pytest.raises(StageError) as caught:
        fit(documents, settings(long_documents="error"))
    first = int(np.flatnonzero(documents.lengths > ROW_TOKENS)[0])
    for part in (
        f"{(documents.lengths > ROW_TOKENS).sum()} documents are longer than a row",
        f"{documents[first].id}: {documents.lengths[first]} tokens",
        "row_tokens",
        "long_documents: split",
    ):
        assert part in str(caught.value)


def test_without_long_documents_the_vocabulary_is_not_read(documents):
    def read_token_ends():
        raise AssertionError("read for nothing")

    longest = int(documents.lengths.max())
    pieces, changes = fit(documents, PackingSettings(row_tokens=max(16, longest)), read_token_ends)
    assert pieces.n_pieces == len(documents)
    assert not changes


@pytest.mark.parametrize("crosses_documents", [True, False], ids=["concatenate", "best_fit"])
def test_supervised_tokens_are_the_labels_the_collator_makes(documents, crosses_documents):
    from workflow_scripts.train.batches import IGNORED, Collator

    pieces, _ = fit(documents, settings())
    strategy = concatenate if crosses_documents else best_fit
    rows = strategy(pieces, row_tokens=ROW_TOKENS, seed=0)
    collate = Collator(documents, crosses_documents=crosses_documents)
    labels = [collate([row])["labels"] for row in rows]
    found = supervised_tokens(documents, rows, crosses_documents=crosses_documents)
    assert found.tolist() == [int((label != IGNORED).sum()) for label in labels]
