from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from workflow_scripts.merge import merge_adapter
from workflow_scripts.merge.adapter import Adapter
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.live_adapter import LiveAdapter
from workflow_scripts.merge.model_weights import (
    LiveWeights,
    MergedWeights,
    RoundedWeights,
    Weights,
    stochastically_rounded,
)
from workflow_scripts.scoring.transformers_model import as_trained


@pytest.fixture(params=["mistral", "mixtral"])
def run(request, checkpoint, mixtral, train):
    """A base and an adapter trained on it."""
    if request.param == "mistral":
        recipe = {"kv_rank": "matched", "rslora": True, "modules_to_save": ["lm_head"]}
        return checkpoint, train(checkpoint, method="lora", **recipe)
    return mixtral, train(mixtral, method="lora", adapts_experts=True, trains_router=True)


def loaded(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def test_every_parameter_is_the_one_that_transformers_loads(run):
    checkpoint, _ = run
    weights = Weights(BaseWeights(checkpoint))
    parameters = dict(loaded(checkpoint).named_parameters())
    assert weights.base.parameters.keys() == parameters.keys()
    for name, expected in parameters.items():
        assert torch.equal(weights[name], expected), name


def test_the_live_sum_is_what_peft_merges_in_float32(run):
    checkpoint, adapter = run
    weights = LiveWeights(BaseWeights(checkpoint), LiveAdapter(adapter, checkpoint))
    from peft import PeftModel

    model = PeftModel.from_pretrained(loaded(checkpoint), adapter).merge_and_unload()
    for name, expected in model.named_parameters():
        torch.testing.assert_close(weights[name], expected, atol=1e-6, rtol=1e-5)


def test_merged_weights_are_those_that_merging_writes(chain, tmp_path):
    merged = load_file(chain.merged / "model.safetensors")
    weights = MergedWeights(BaseWeights(chain.checkpoint), Adapter(chain.adapter))
    assert weights.base.parameters.keys() == merged.keys()
    for name, expected in merged.items():
        assert torch.equal(weights[name], expected.float()), name


def test_tied_embeddings_are_those_that_were_trained(tied, train, tmp_path):
    recipe = {"method": "lora", "modules_to_save": ["embed_tokens"]}
    adapter = train(tied, **recipe)
    live = LiveWeights(BaseWeights(tied), LiveAdapter(adapter, tied))
    model = as_trained(loaded(tied), adapter)
    assert torch.equal(live["lm_head.weight"], live["model.embed_tokens.weight"])
    trained = model.get_input_embeddings().modules_to_save["default"].weight
    assert torch.equal(live["model.embed_tokens.weight"], trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_gives_a_neighbour_and_is_right_on_average(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator, dtype=torch.float64)
    values = torch.cat([values, -values, torch.tensor([0.0, 1.0, 1e-5, -3e-6, 255.9])])
    nearest = values.to(dtype).double()
    unit = (values.abs() * torch.finfo(dtype).eps).clamp(min=torch.finfo(dtype).smallest_normal)
    drawn = torch.stack(
        [stochastically_rounded(values, dtype, generator).double() for _ in range(4000)]
    )
    assert ((drawn - values).abs() <= unit).all()
    assert (drawn != nearest).any() and (drawn == nearest).any()
    for at, value in enumerate(values):
        assert len(drawn[:, at].unique()) <= 2
        # Five standard errors of a coin toss between two neighbours.
        assert abs(drawn[:, at].mean() - value) <= 5 * unit[at] / 2 / 4000**0.5
    exact = values.to(dtype).double()
    assert torch.equal(stochastically_rounded(exact, dtype, generator).double(), exact)


def test_rounded_weights_differ_by_seed_and_are_the_same_for_one(chain):
    weights = LiveWeights(
        BaseWeights(chain.checkpoint), LiveAdapter(chain.adapter, chain.checkpoint)
    )
    name = "model.layers.1.mlp.up_proj.weight"
    one, again, other = (RoundedWeights(weights, torch.bfloat16, seed)[name] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.testing.assert_close(one, weights[name], rtol=2**-7, atol=0)


def test_the_gate_does_not_use_the_module_that_merges(monkeypatch, chain):
    """The gate reads the adapter independently of the code that merges."""
    monkeypatch.setattr(Adapter, "__init__", lambda *_: pytest.fail("the merging code was used"))
    live = LiveAdapter(chain.adapter, chain.checkpoint)
    LiveWeights(BaseWeights(chain.checkpoint), live)["model.layers.0.self_attn.q_proj.weight"]
    assert merge_adapter.OUTPUT_VERSION
