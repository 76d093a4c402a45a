from __future__ import annotations

import pytest
import torch

from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.packing import Piece
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import attention
from workflow_scripts.train.batches import Collator
from workflow_scripts.train.model import adapt
from workflow_scripts.train.probe import check_attention

LENGTHS = [5, 60, 200]
ROW = [Piece(number, 0, length) for number, length in enumerate(LENGTHS)]
ALPHA = 5.0


@pytest.fixture
def documents(random_documents, tmp_path):
    return random_documents(tmp_path / "train.arrow", LENGTHS)


@pytest.fixture
def noisy(checkpoint, facts):
    """`noisy(**settings)`: an adapted model with noise, and the inputs of its first layer."""

    def make(**settings):
        recipe = RecipeSettings(method="lora", rank=8, neftune_alpha=ALPHA, **settings)
        base = load_model(checkpoint, window=8, precision="float32", attention=attention.register())
        model = adapt(base, facts, recipe)
        handed = []
        base.model.layers[0].register_forward_pre_hook(
            lambda _, inputs: handed.append(inputs[0].detach())
        )
        return model, handed

    return make


def noise_of(model, handed, batch):
    """(tokens, hidden_size): the first layer's input minus the tokens' embeddings."""
    handed.clear()
    model(**batch)
    with torch.no_grad():
        embedded = model.get_input_embeddings().weight[batch["input_ids"][0]]
    return handed[0][0] - embedded


def test_a_documents_noise_is_bounded_by_its_own_length(noisy, documents):
    model, handed = noisy()
    model.train()
    batch = Collator(documents, crosses_documents=False)([ROW])
    noise = noise_of(model, handed, batch)
    for part, length in zip(noise.split(LENGTHS), LENGTHS, strict=True):
        bound = ALPHA / (length * part.shape[1]) ** 0.5
        assert 0.98 * bound < part.abs().max() <= 1.0001 * bound
        # Uniform noise: its variance is a third of the bound's square. At least 1280 numbers.
        assert part.var() == pytest.approx(bound**2 / 3, rel=0.1)
        assert abs(part.mean()) < 0.1 * bound


def test_a_packed_documents_noise_is_as_large_as_that_of_the_document_alone(noisy, documents):
    model, handed = noisy()
    model.train()
    collate = Collator(documents, crosses_documents=False)
    packed = noise_of(model, handed, collate([ROW])).split(LENGTHS)
    for piece, part in zip(ROW, packed, strict=True):
        alone = noise_of(model, handed, collate([[piece]]))
        # Standard deviations of at least 1280 uniform numbers. If the row counted as one document,
        # the shortest document's would be 7 times smaller.
        assert part.std() == pytest.approx(float(alone.std()), rel=0.1)


@pytest.mark.parametrize("whole", [[], ["embed_tokens"]])
def test_noise_is_added_in_training_and_not_in_evaluation(noisy, documents, whole):
    model, handed = noisy(modules_to_save=whole)
    batch = Collator(documents, crosses_documents=False)([ROW])
    model.eval()
    assert not noise_of(model, handed, batch).any()
    model.train()
    assert noise_of(model, handed, batch).any()
    assert not torch.equal(noise_of(model, handed, batch), noise_of(model, handed, batch))


def test_the_random_state_decides_the_noise(noisy, documents):
    model, handed = noisy()
    model.train()
    batch = Collator(documents, crosses_documents=False)([ROW])
    torch.manual_seed(7)
    first = noise_of(model, handed, batch)
    torch.manual_seed(7)
    assert torch.equal(noise_of(model, handed, batch), first)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_attention_probe_is_not_misled_by_noise(noisy, documents, plan_of, facts, is_training):
    model, _ = noisy()
    model.train(is_training)
    plan = plan_of([ROW], row_tokens=300)
    probed = check_attention(model, documents, plan, facts.layer_windows)
    assert 0 < probed["n_moved_tokens"] <= LENGTHS[1]
