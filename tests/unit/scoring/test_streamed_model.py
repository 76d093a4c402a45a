from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tests.facts import facts_of
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.model_weights import Weights
from workflow_scripts.scoring.likelihood import all_logits, score_documents
from workflow_scripts.scoring.pieces import Piece
from workflow_scripts.scoring.streamed_model import StreamedModel, batches
from workflow_scripts.scoring.transformers_model import TransformersModel

LENGTHS = [7, 3, 30, 8, 9, 2]


def random_pieces(lengths=LENGTHS, vocabulary=300):
    generator = np.random.default_rng(0)
    return [
        Piece(
            number // 2,
            generator.integers(3, vocabulary, size=length).astype(np.int32),
            np.arange(1, length),
        )
        for number, length in enumerate(lengths)
    ]


@pytest.fixture(params=["mistral", "tied", "mixtral", "yarn"])
def model(request, checkpoint, tied, mixtral, make_checkpoint, tmp_path):
    if request.param == "yarn":
        rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
        rope["original_max_position_embeddings"] = 256
        return make_checkpoint(tmp_path / "yarn", rope_parameters=rope)
    return {"mistral": checkpoint, "tied": tied, "mixtral": mixtral}[request.param]


def test_logits_are_those_of_the_whole_model_one_document_at_a_time(model):
    """One batch has lengths on both sides of the window; a mixture has other names in its files."""
    window = facts_of(model).sliding_window
    streamed = StreamedModel(model, Weights(BaseWeights(model)), window=window)
    whole = TransformersModel(model, window=window, precision="float32")
    pieces = random_pieces()
    (batch,) = batches(pieces)
    for piece, found in zip(batch, streamed.logits(batch), strict=True):
        expected = all_logits(whole, piece)
        assert found.shape == expected.shape == (len(piece.input_ids) - 1, 300)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    nats, expected_nats = streamed.score(pieces), score_documents(whole, pieces)
    assert list(nats) == list(expected_nats) == [0, 1, 2]
    for document, expected in expected_nats.items():
        np.testing.assert_allclose(nats[document], expected, atol=1e-4)


def test_the_given_window_is_used(checkpoint):
    pieces = random_pieces([30])
    weights = Weights(BaseWeights(checkpoint))
    narrow, wide = (StreamedModel(checkpoint, weights, window=window) for window in (8, None))
    (one,), (other,) = narrow.logits(pieces), wide.logits(pieces)
    torch.testing.assert_close(one[:8], other[:8], atol=2e-5, rtol=1e-5)
    assert (one[8:] - other[8:]).abs().amax() > 0.01


def test_no_weight_stays_in_memory(checkpoint):
    streamed = StreamedModel(checkpoint, Weights(BaseWeights(checkpoint)), window=None)
    streamed.logits(random_pieces())
    gc.collect()
    assert all(parameter.is_meta for parameter in streamed._model.parameters())


def test_batches_hold_pieces_of_similar_length_within_the_limit():
    pieces = random_pieces([5, 100, 6, 40, 7, 8])
    found = list(batches(pieces, 30))
    assert [[len(piece.input_ids) for piece in batch] for batch in found] == [
        [5, 6, 7], [8], [40], [100],
    ]  # fmt: skip
    assert list(batches([], 30)) == []
