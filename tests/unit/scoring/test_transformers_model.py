from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.facts import facts_of
from workflow_scripts.log import StageError
from workflow_scripts.scoring import transformers_model
from workflow_scripts.scoring.transformers_model import TransformersModel
from workflow_scripts.settings import RopeScalingSettings

TOKENS = np.random.default_rng(0).integers(3, 300, size=40).astype(np.int32)


def plain_logits(checkpoint, *, window, adapter=None):
    """(tokens, vocabulary) logits of a direct call of the model."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    config.sliding_window = window
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype("int64"))[None]).logits[0]


def scored_logits(model, positions):
    blocks = list(model.logit_blocks(TOKENS, np.array(positions)))
    return torch.cat(blocks)


@pytest.mark.parametrize("window", [8, None])
def test_logits_are_the_models_own_at_the_requested_positions(checkpoint, window):
    model = TransformersModel(checkpoint, window=window, precision="float32")
    positions = [0, 3, 20, 39]
    found = scored_logits(model, positions)
    expected = plain_logits(checkpoint, window=window)[positions]
    assert found.dtype == torch.float32
    # sdpa compared with eager attention; measured 3e-6 for logits of size 3.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_given_window_is_used(checkpoint):
    windowed, full = (
        scored_logits(TransformersModel(checkpoint, window=w, precision="float32"), [5, 39])
        for w in (8, None)
    )
    torch.testing.assert_close(windowed[0], full[0], rtol=0, atol=2e-5)
    assert (windowed[1] - full[1]).abs().max() > 0.01


def test_an_adapter_is_applied_live(checkpoint, uniform_adapter):
    model = TransformersModel(checkpoint, window=8, precision="float32", adapter=uniform_adapter)
    positions = list(range(40))
    found = scored_logits(model, positions)
    expected = plain_logits(checkpoint, window=8, adapter=uniform_adapter)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (expected - plain_logits(checkpoint, window=8)).abs().max() > 0.1


def test_a_vocabulary_that_fills_a_block_gives_one_block_per_position(make_checkpoint, tmp_path):
    """With 2,097,152 tokens a block has room for two positions."""
    vocabulary = transformers_model.BLOCK_ELEMENTS // 2
    make_checkpoint(
        tmp_path,
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = TransformersModel(tmp_path, window=8, precision="float32")
    positions = np.array([1, 4, 5])
    blocks = list(model.logit_blocks(TOKENS, positions))
    assert [tuple(block.shape) for block in blocks] == [(2, vocabulary), (1, vocabulary)]
    with torch.no_grad():
        expected = model.model(torch.from_numpy(TOKENS.astype("int64"))[None]).logits[0, positions]
    # A product of another shape sums in another order; measured 1e-7.
    torch.testing.assert_close(torch.cat(blocks), expected, rtol=0, atol=1e-5)


def test_nf4_scores_with_the_quantized_base(checkpoint):
    import bitsandbytes

    nf4 = TransformersModel(checkpoint, window=8, precision="nf4")
    dense = TransformersModel(checkpoint, window=8, precision="float32")
    layers = dict(dense.model.named_modules())
    with torch.no_grad():
        for name, layer in nf4.model.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weight = layer.weight
                layers[name].weight.copy_(
                    bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                )
    positions = list(range(40))
    found, expected = scored_logits(nf4, positions), scored_logits(dense, positions)
    # Measured 0; compared with the unquantized base, 1.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_int8_scores_with_the_quantized_base(checkpoint):
    import bitsandbytes

    int8 = TransformersModel(checkpoint, window=8, precision="int8")
    kinds = {type(layer) for layer in int8.model.modules()}
    assert bitsandbytes.nn.Linear8bitLt in kinds
    positions = list(range(40))
    found = scored_logits(int8, positions)
    expected = plain_logits(checkpoint, window=8)
    difference = (found - expected).abs().mean()
    nf4 = scored_logits(TransformersModel(checkpoint, window=8, precision="nf4"), positions)
    # Nearer than 4 bits, and not the same: measured 0.026 and 0.22 for logits of size 3.
    assert 1e-4 < difference < (nf4 - expected).abs().mean() / 3


@pytest.fixture
def full_fine_tune(checkpoint, tmp_path):
    """A full fine-tune that moved every weight at random, and the resulting model."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from workflow_scripts import files

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    files.write_json(tmp_path / "adapter_config.json", {"peft_type": None, "method": "full"})
    return tmp_path, model


def test_a_full_fine_tune_is_scored_with_its_own_weights(checkpoint, full_fine_tune):
    folder, model = full_fine_tune
    scorer = TransformersModel(checkpoint, window=8, precision="float32", adapter=folder)
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS.astype("int64"))[None]).logits[0]
    found = scored_logits(scorer, list(range(40)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["another model", "a quantized model"])
def test_a_full_fine_tune_of_something_else_is_refused(
    checkpoint, make_checkpoint, full_fine_tune, tmp_path, case
):
    folder, _ = full_fine_tune
    base, precision = checkpoint, "nf4"
    if case == "another model":
        base = make_checkpoint(tmp_path / "shallow", num_hidden_layers=1)
        precision = "float32"
    with pytest.raises(StageError, match="the trained weights do not fit the model") as caught:
        TransformersModel(base, window=8, precision=precision, adapter=folder)
    assert "adapter_model.safetensors" in str(caught.value)


def test_the_given_positions_are_used(checkpoint):
    facts = facts_of(checkpoint, RopeScalingSettings(type="linear", factor=2))
    plain = TransformersModel(checkpoint, window=None, precision="float32")
    scaled = TransformersModel(
        checkpoint, window=None, precision="float32", rope=facts.rope_parameters
    )
    with torch.no_grad():
        tokens = torch.from_numpy(TOKENS.astype("int64"))[None]
        halves = torch.arange(40)[None] / 2
        # Without a mask, steps of a half would be taken as borders of packed documents.
        mask = torch.ones_like(tokens)
        expected = plain.model(
            tokens, attention_mask=mask, position_ids=halves, use_cache=False
        ).logits[0]
    found = scored_logits(scaled, list(range(40)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (found - plain_logits(checkpoint, window=None)).abs().max() > 0.01
