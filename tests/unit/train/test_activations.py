from __future__ import annotations

import pytest
import torch

from workflow_scripts.handover.facts import Facts
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.packing import Piece
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import activations, attention
from workflow_scripts.train.batches import Collator
from workflow_scripts.train.model import adapt

ROWS = [[Piece(0, 0, 60), Piece(1, 0, 40)], [Piece(2, 0, 90)]]
RECIPE = RecipeSettings(rank=8)


@pytest.fixture(scope="module")
def batch(random_documents, tmp_path_factory):
    documents = random_documents(tmp_path_factory.mktemp("tokens") / "t.arrow", [60, 40, 90])
    return Collator(documents, crosses_documents=False)(ROWS)


@pytest.fixture(scope="module")
def deep(make_checkpoint, write_facts, tmp_path_factory):
    """Five layers."""
    folder = make_checkpoint(tmp_path_factory.mktemp("deep") / "m", num_hidden_layers=5)
    return folder, Facts.read(write_facts(folder, folder.parent / "facts.json"))


def model_of(deep, recipe=RECIPE):
    checkpoint, facts = deep
    torch.manual_seed(0)
    base = load_model(checkpoint, window=8, precision="float32", attention=attention.register())
    model = adapt(base, facts, recipe).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def step(model, batch):
    """Loss, gradients, and bytes that autograd kept for the backward pass."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(**batch).loss
    n_bytes = sum(kept.values())
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, n_bytes


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0
        # The same operations on the same numbers: no difference at all.
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("n_layers", [1, 2, 5])
def test_keeping_less_leaves_loss_and_gradients_bit_identical(deep, batch, n_layers, offloads):
    expected = step(model_of(deep), batch)
    model = model_of(deep)
    activations.save_less(model, n_checkpointed_layers=n_layers, offloads=offloads)
    found = step(model, batch)
    assert_same(found, expected)
    # A layer's input is 1/30 of what it keeps, so the saving grows with the layers.
    share = found[2] / expected[2]
    assert share < 1 - 0.15 * n_layers, share


def test_a_recomputed_layer_has_the_same_dropout(deep, batch):
    recipe = RECIPE.model_copy(update={"dropout": 0.5})
    expected = step(model_of(deep, recipe), batch)
    plain = step(model_of(deep), batch)
    assert expected[0] != plain[0]
    model = model_of(deep, recipe)
    activations.save_less(model, n_checkpointed_layers=5)
    assert_same(step(model, batch), expected)


@pytest.mark.parametrize("n_layers", range(6))
def test_the_requested_number_of_layers_is_checkpointed_and_evenly_spread(deep, n_layers):
    model = model_of(deep)
    plain = type(model.get_base_model().model.layers[0]).forward
    activations.save_less(model, n_checkpointed_layers=n_layers)
    layers = model.get_base_model().model.layers
    at = [i for i, layer in enumerate(layers) if getattr(layer.forward, "__func__", 0) is not plain]
    assert len(at) == n_layers
    gaps = [after - before for before, after in zip(at, at[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_an_evaluation_recomputes_nothing(deep, batch):
    model = model_of(deep)
    calls = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: calls.append(1)  # recomputation stops as soon as it has what is needed
    )
    activations.save_less(model, n_checkpointed_layers=5)
    model.eval()
    with torch.no_grad():
        model(**batch)
    assert len(calls) == 1
    model.train()
    model(**batch).loss.backward()
    assert len(calls) == 3  # forward, and again in the backward pass


def test_tensors_come_back_after_an_earlier_pass_was_dropped(deep, batch):
    """For example an evaluation with gradients: its tensors must not be mistaken for others."""
    expected = step(model_of(deep), batch)
    model = model_of(deep)
    activations.save_less(model, n_checkpointed_layers=5, offloads=True)
    model(**batch)
    assert_same(step(model, batch), expected)
