"""Memory that autograd keeps, predicted and counted on the real model, on a CPU in float32."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.unit.train.counted_memory import Live, config_of, model_of
from tests.unit.train.shapes import MISTRAL_7B, TINY, setup_of
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.activations import save_less
from workflow_scripts.train.memory import prediction
from workflow_scripts.train.memory.shape import Shape


@pytest.fixture(scope="module")
def checkpoint_of(make_checkpoint, tmp_path_factory):
    """`checkpoint_of(facts)`: a checkpoint of that shape with random weights."""

    def make(facts):
        options = config_of(facts).to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        names += ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window")
        return make_checkpoint(
            tmp_path_factory.mktemp("shape"), **{name: options[name] for name in names}
        )

    return make


def batch_of(n_tokens, *, vocabulary=300):
    bounds = torch.tensor([0, n_tokens], dtype=torch.int32)
    ids = torch.randint(3, vocabulary, (1, n_tokens))
    return {
        "input_ids": ids,
        "position_ids": torch.arange(n_tokens)[None],
        "labels": ids,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": n_tokens,
        "max_length_k": n_tokens,
    }


def predicted_bytes(shape, *, n_tokens, setup):
    """Bytes kept between the forward and the backward pass of a micro-batch of `n_tokens`."""
    kept = prediction.kept_by_layers(shape, n_tokens=n_tokens, setup=setup)
    kept += n_tokens * (prediction.norm_bytes(shape) + shape.state_bytes * shape.hidden)
    if shape.is_full:
        # The output layer's gradient, which the forward pass of the loss has computed already.
        kept += 4 * shape.facts.vocabulary_size * shape.hidden
    return kept


def kept_bytes(model, batch):
    """Bytes that a forward pass keeps for the backward pass, without the model's own tensors and
    without tensors of a temporary graph (DoRA's norms)."""
    own = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        own += [state.absmax, state.code, state.state2.absmax] if state else []
    known = {tensor.untyped_storage()._cdata for tensor in own}
    kept = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        holder = Kept(tensor)
        kept.add(holder)
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = model(**batch).loss
    storages = {
        holder.tensor.untyped_storage()._cdata: holder.tensor.untyped_storage().nbytes()
        for holder in kept
    }
    result.backward()
    return sum(size for key, size in storages.items() if key not in known)


LAYERS = {
    "plain": (TINY, {}),
    "as PEFT has it": (TINY, {"fuses": False}),
    "k and v of less rank": (TINY, {"kv_rank": "matched", "rank": 64}),
    "two targets": (TINY, {"target_modules": ["q_proj", "v_proj"]}),
    "dropout": (TINY, {"dropout": 0.1}),
    "DoRA": (TINY, {"dora": True}),
    "16-bit method": (TINY, {"method": "lora"}),
    "full": (TINY, {"method": "full"}),
    "wide heads": (TINY.changed(head_dim=64, n_kv_heads=4), {}),
    "narrow feed-forward": (TINY.changed(intermediate_size=256), {}),
    "a window": (TINY.changed(sliding_window=64, layer_windows=[64] * 2), {}),
    "a 7B's layer": (MISTRAL_7B.changed(n_layers=1, vocabulary_size=512), {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_autograd_keeps_the_bytes_of_the_formulas(name, checkpoint_of):
    facts, options = LAYERS[name]
    options = dict(options)
    fuses = options.pop("fuses", True)
    recipe = RecipeSettings(**options)
    n_tokens = 256 if name == "a 7B's layer" else 512
    precision = {"qlora": "nf4"}.get(recipe.method, "float32")
    model = model_of(checkpoint_of(facts), facts, recipe, precision=precision, fuses=fuses)
    shape = Shape(facts, recipe, compute_bytes=4, is_cuda=False, has_liger=False, fuses=fuses)
    predicted = predicted_bytes(shape, n_tokens=n_tokens, setup=setup_of(1, 0, False))
    found = kept_bytes(model, batch_of(n_tokens))
    # Measured: 0.1 % apart; with a window 1.1 %, because of its masks.
    assert found == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize("n_again", [1, 2])
def test_a_checkpointed_layer_keeps_only_its_input(n_again, checkpoint_of):
    recipe = RecipeSettings()
    model = model_of(checkpoint_of(TINY), TINY, recipe)
    save_less(model, n_checkpointed_layers=n_again)
    shape = Shape(TINY, recipe, compute_bytes=4, is_cuda=False, has_liger=False)
    batch = batch_of(512)
    with Live() as live:
        result = model(**batch).loss
    predicted = predicted_bytes(shape, n_tokens=512, setup=setup_of(1, n_again, False))
    assert live.now == pytest.approx(predicted, rel=0.03), live.now / predicted
    result.backward()
