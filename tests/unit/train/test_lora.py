from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.lora import kv_rank, lora_config


def adapted_layers(checkpoint, facts, recipe):
    """name → layer of every module that PEFT adapted, as PEFT itself built it."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    base = load_model(checkpoint, window=facts["sliding_window"], precision="float32")
    model = get_peft_model(base, lora_config(recipe, facts))
    return {
        name.rpartition("base_model.model.")[2]: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize(
    ("setting", "expected"), [("uniform", 16), ("matched", 4), (6, 6), (16, 16), (32, 32)]
)
def test_k_and_v_get_their_rank_and_every_module_the_same_scale(
    checkpoint, facts, setting, expected
):
    recipe = RecipeSettings(rank=16, alpha=40, kv_rank=setting)
    layers = adapted_layers(checkpoint, facts, recipe)
    for name, layer in layers.items():
        is_kv = name.endswith(("k_proj", "v_proj"))
        assert layer.r["default"] == (expected if is_kv else 16), name
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"], name
        assert layer.scaling["default"] == pytest.approx(40 / 16, rel=1e-12), name


def test_every_linear_layer_but_the_output_is_adapted(checkpoint, facts):
    model = load_model(checkpoint, window=None, precision="float32")
    linear = {n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    layers = adapted_layers(checkpoint, facts, RecipeSettings(rank=8, alpha=8))
    assert layers.keys() == linear - {"lm_head"}
    assert len(layers) == 2 * 7


def test_a_fresh_adapter_changes_no_logit(checkpoint, facts):
    from peft import get_peft_model

    model = load_model(checkpoint, window=8, precision="float32")
    tokens = torch.arange(1, 12)[None]
    with torch.no_grad():
        before = model(tokens).logits
        recipe = RecipeSettings(rank=8, alpha=16, kv_rank="matched")
        after = get_peft_model(model, lora_config(recipe, facts))(tokens).logits
    assert torch.equal(before, after)


@given(groups=st.integers(1, 16), n_kv_heads=st.integers(1, 16), rank=st.integers(1, 256))
def test_the_matched_rank_is_the_same_budget_a_head_or_an_error(groups, n_kv_heads, rank):
    recipe = RecipeSettings(rank=rank, kv_rank="matched")
    n_heads = groups * n_kv_heads
    if rank % groups:
        with pytest.raises(StageError, match="no whole number"):
            kv_rank(recipe, n_heads=n_heads, n_kv_heads=n_kv_heads)
    else:
        found = kv_rank(recipe, n_heads=n_heads, n_kv_heads=n_kv_heads)
        assert found >= 1 and found * n_heads == rank * n_kv_heads


def test_a_matched_rank_that_is_no_whole_number_says_what_would_be(facts):
    with pytest.raises(StageError) as caught:
        lora_config(RecipeSettings(rank=18, kv_rank="matched"), facts)
    for part in ("recipes.<name>.rank", "18 × 2 kv heads ÷ 8 heads", "a multiple of 4"):
        assert part in str(caught.value)
