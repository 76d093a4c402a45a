from __future__ import annotations

import pytest
import torch

from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.packing import Piece
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import attention, projections
from workflow_scripts.train.batches import Collator
from workflow_scripts.train.model import adapt

ROWS = [[Piece(0, 0, 60), Piece(1, 0, 40)]]


@pytest.fixture(scope="module")
def batch(random_documents, tmp_path_factory):
    documents = random_documents(tmp_path_factory.mktemp("tokens") / "t.arrow", [60, 40])
    return Collator(documents, crosses_documents=False)(ROWS)


def model_of(checkpoint, facts, *, fused, precision="nf4", **recipe):
    torch.manual_seed(0)
    base = load_model(checkpoint, window=8, precision=precision, attention=attention.register())
    model = adapt(base, facts, RecipeSettings(**{"rank": 8, "kv_rank": "matched", **recipe}))
    for layer in model.modules():
        vars(layer).pop("forward", None) if hasattr(layer, "lora_A") else None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    n_fused = projections.fuse(model) if fused else 0
    return model.train(), n_fused


def step(model, batch):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def largest_difference(found, expected):
    assert found[1].keys() == expected[1].keys()
    return max(
        abs(found[0] / expected[0] - 1),
        *(
            float((found[1][name] - gradient).abs().max() / gradient.abs().max())
            for name, gradient in expected[1].items()
        ),
    )


@pytest.mark.parametrize("precision", ["nf4", "float32"])
@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_equal_pefts(checkpoint, facts, batch, precision, rslora):
    options = {"precision": precision, "rslora": rslora}
    expected, _ = model_of(checkpoint, facts, fused=False, **options)
    found, n_fused = model_of(checkpoint, facts, fused=True, **options)
    assert n_fused == 14  # seven projections in each of two layers
    # Measured 1e-6: the products are the same but are summed in another order.
    assert largest_difference(step(found, batch), step(expected, batch)) < 1e-5


def test_in_bfloat16_the_fused_step_is_as_close_to_float32_as_pefts(checkpoint, facts, batch):
    exact = step(model_of(checkpoint, facts, fused=False)[0], batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        peft = step(model_of(checkpoint, facts, fused=False)[0], batch)
        fused = step(model_of(checkpoint, facts, fused=True)[0], batch)
    assert largest_difference(fused, exact) < 1.2 * largest_difference(peft, exact)
    for gradient in fused[1].values():
        assert gradient.dtype == torch.float32


def test_less_is_kept_for_the_backward_pass(checkpoint, facts, batch):
    def kept(fused):
        model, _ = model_of(checkpoint, facts, fused=fused)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            model(**batch)
        return sum(storages.values())

    assert kept(True) < kept(False)


@pytest.mark.parametrize(
    "recipe", [{"dropout": 0.1}, {"dora": True}, {"precision": "int8"}], ids=str
)
def test_layers_that_are_not_plain_are_left_to_peft(checkpoint, facts, recipe):
    assert model_of(checkpoint, facts, fused=True, **recipe)[1] == 0


def test_a_disabled_adapter_has_no_effect(checkpoint, facts, batch):
    model, _ = model_of(checkpoint, facts, fused=True)
    with torch.no_grad():
        on = model(**batch).loss
        with model.disable_adapter():
            off = model(**batch).loss
    bare = load_model(checkpoint, window=8, precision="nf4", attention=attention.register())
    from workflow_scripts.train.loss import sum_loss

    sum_loss(bare)
    with torch.no_grad():
        assert torch.equal(off, bare(**batch).loss)
    assert abs(on - off) > 0.1
