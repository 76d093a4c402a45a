from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from tests.facts import facts_of
from tests.unit.train.mixtral import N_EXPERTS, save_mixtral, tiny_mixtral
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.lora import kv_rank, lora_config


@pytest.fixture(scope="module")
def mixtral_facts(tmp_path_factory):
    return facts_of(save_mixtral(tmp_path_factory.mktemp("mixtral")))


def adapted_layers(checkpoint, facts, recipe):
    """Every layer that PEFT adapted, by name, as PEFT built it."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    if facts.n_experts:
        base = tiny_mixtral()
    else:
        base = load_model(checkpoint, window=facts.sliding_window, precision="float32")
    model = get_peft_model(base, lora_config(recipe, facts))
    return {
        name.rpartition("base_model.model.")[2]: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize(("rslora", "scale"), [(False, 40 / 16), (True, 40 / 4)])
@pytest.mark.parametrize(
    ("setting", "expected"), [("uniform", 16), ("matched", 4), (6, 6), (16, 16), (32, 32)]
)
def test_k_and_v_get_their_rank_and_all_modules_have_the_same_scale(
    checkpoint, facts, setting, expected, rslora, scale
):
    recipe = RecipeSettings(rank=16, alpha=40, kv_rank=setting, rslora=rslora)
    layers = adapted_layers(checkpoint, facts, recipe)
    for name, layer in layers.items():
        is_kv = name.endswith(("k_proj", "v_proj"))
        assert layer.r["default"] == (expected if is_kv else 16), name
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"], name
        assert layer.scaling["default"] == pytest.approx(scale, rel=1e-12), name


def test_every_linear_layer_except_the_output_is_adapted(checkpoint, facts):
    model = load_model(checkpoint, window=None, precision="float32")
    linear = {n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    layers = adapted_layers(checkpoint, facts, RecipeSettings(rank=8, alpha=8))
    assert layers.keys() == linear - {"lm_head"}
    assert len(layers) == 2 * 7


def test_a_new_adapter_changes_no_logit(checkpoint, facts):
    from peft import get_peft_model

    model = load_model(checkpoint, window=8, precision="float32")
    tokens = torch.arange(1, 12)[None]
    with torch.no_grad():
        before = model(tokens).logits
        recipe = RecipeSettings(rank=8, alpha=16, kv_rank="matched")
        after = get_peft_model(model, lora_config(recipe, facts))(tokens).logits
    assert torch.equal(before, after)


@given(n_heads=st.integers(1, 64), n_kv_heads=st.integers(1, 16), rank=st.integers(1, 256))
def test_the_matched_rank_gives_each_head_the_same_budget_or_an_error(n_heads, n_kv_heads, rank):
    recipe = RecipeSettings(rank=rank, kv_rank="matched")
    if rank * n_kv_heads % n_heads == 0:
        found = kv_rank(recipe, n_heads=n_heads, n_kv_heads=n_kv_heads)
        assert found >= 1 and found * n_heads == rank * n_kv_heads
        return
    with pytest.raises(StageError) as caught:
        kv_rank(recipe, n_heads=n_heads, n_kv_heads=n_kv_heads)
    # The ranks that the message names do work.
    divisor = int(caught.value.what.rpartition(" ")[2])
    named = [int(word) for word in caught.value.parts["expected"].split() if word.isdigit()]
    assert named and all(one % divisor == 0 for one in named)
    for one in named:
        better = RecipeSettings(rank=one, kv_rank="matched")
        assert kv_rank(better, n_heads=n_heads, n_kv_heads=n_kv_heads) >= 1


def test_the_error_for_a_fractional_matched_rank_names_ranks_that_work(facts):
    with pytest.raises(StageError) as caught:
        lora_config(RecipeSettings(rank=18, kv_rank="matched"), facts)
    for part in (
        "kv_rank: matched gives 4.50 for k and v; choose a rank divisible by 4",
        "recipes.<name>.rank",
        "18 × 2 kv heads ÷ 8 heads",
        "16 or 20",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
        (["self_attn.o_proj", "mlp.down_proj"], {"self_attn.o_proj", "mlp.down_proj"}),
    ],
)
def test_exactly_the_listed_targets_are_adapted(checkpoint, facts, targets, found):
    layers = adapted_layers(checkpoint, facts, RecipeSettings(rank=8, target_modules=targets))
    assert layers.keys() == {f"model.layers.{at}.{name}" for at in (0, 1) for name in found}


def test_a_target_may_name_a_single_layer(checkpoint, facts):
    recipe = RecipeSettings(rank=8, target_modules=["layers.1.mlp.up_proj"])
    assert adapted_layers(checkpoint, facts, recipe).keys() == {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("target", ["qproj", "proj", "lm_head", "embed_tokens", "layers.2.q_proj"])
def test_the_error_for_an_unknown_target_lists_the_modules(facts, target):
    with pytest.raises(StageError) as caught:
        lora_config(RecipeSettings(target_modules=["q_proj", target]), facts)
    message = str(caught.value)
    assert "recipes.<name>.target_modules" in message
    assert f"{target}\n" in message and "q_proj, k_proj, v_proj, o_proj, gate_proj" in message


def test_a_mixture_has_no_mlp_to_name(mixtral_facts):
    with pytest.raises(StageError, match="up_proj") as caught:
        lora_config(RecipeSettings(target_modules=["q_proj", "up_proj"]), mixtral_facts)
    assert "all-linear, or some of q_proj, k_proj, v_proj, o_proj\n" in str(caught.value)
    assert "adapts_experts" in str(caught.value)


def test_dropout_and_dora_reach_every_adapted_layer(checkpoint, facts):
    recipe = RecipeSettings(rank=8, dropout=0.25, dora=True, kv_rank="matched")
    for name, layer in adapted_layers(checkpoint, facts, recipe).items():
        assert layer.lora_dropout["default"].p == 0.25, name
        assert layer.use_dora["default"], name


def test_by_default_only_attention_of_a_mixture_is_adapted(mixtral_facts):
    """PEFT 0.21's `all-linear` would adapt experts and router too."""
    layers = adapted_layers(None, mixtral_facts, RecipeSettings(rank=8))
    assert {name.split(".", 3)[3] for name in layers} == {
        f"self_attn.{part}_proj" for part in "qkvo"
    }


def test_adapted_experts_each_have_the_rank_and_the_scale(mixtral_facts):
    recipe = RecipeSettings(rank=8, alpha=24, kv_rank="matched", adapts_experts=True)
    layers = adapted_layers(None, mixtral_facts, recipe)
    experts = {name: layer for name, layer in layers.items() if ".mlp.experts" in name}
    assert sorted({layer.parameter_name for layer in experts.values()}) == [
        "down_proj",
        "gate_up_proj",
    ]
    assert len(experts) == 2 * 2
    for name, layer in experts.items():
        assert layer.lora_A["default"].out_features == 8 * N_EXPERTS, name
        assert layer.scaling["default"] == 24 / 8, name
    assert not any(name.endswith(".gate") for name in layers)


@pytest.mark.parametrize(
    "settings",
    [{"adapts_experts": True}, {"trains_router": True}, {"router_loss_coefficient": 0.01}],
)
def test_a_setting_for_experts_is_refused_for_a_dense_model(facts, settings):
    with pytest.raises(StageError, match=next(iter(settings))) as caught:
        lora_config(RecipeSettings(**settings), facts)
    assert "recipes.<name>" in str(caught.value)
