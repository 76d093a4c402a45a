from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge.adapter import Adapter
from workflow_scripts.merge.tensor_names import Part


def peft_layers(checkpoint, adapter):
    """Base tensor name → PEFT's own LoRA layer."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).get_base_model()
    return {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("kind", ["uniform_adapter", "matched_adapter"])
def test_scales_and_deltas_are_pefts_own(request, checkpoint, kind):
    folder = request.getfixturevalue(kind)
    adapter = Adapter(folder)
    layers = peft_layers(checkpoint, folder)
    assert adapter.targets == layers.keys() and len(layers) == 14
    for name, layer in layers.items():
        assert adapter.config.scale(name.removesuffix(".weight")) == layer.scaling["default"], name
        assert torch.equal(adapter.delta(Part(name)), layer.get_delta_weight("default")), name


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"layers.1.self_attn.k_proj": 2}},
        {"rank_pattern": {r"layers\.1\.mlp\..*": 4, r"layers\.0\.mlp\.gate_proj": 2}},
        {"alpha_pattern": {"(up|down)_proj": 3}},
        {"alpha_pattern": {"self_attn.q_proj": 3}, "rank_pattern": {"q_proj": 4}},
    ],
    ids=["full name", "regex", "alternatives", "alpha and rank"],
)
def test_patterns_are_matched_as_peft_matches_them(checkpoint, make_adapter, tmp_path, patterns):
    make_adapter(checkpoint, tmp_path, **patterns)
    adapter = Adapter(tmp_path)
    for name, layer in peft_layers(checkpoint, tmp_path).items():
        assert adapter.config.scale(name.removesuffix(".weight")) == layer.scaling["default"], name


def test_the_scale_of_rslora_is_pefts_own(checkpoint, make_adapter, tmp_path):
    make_adapter(checkpoint, tmp_path, use_rslora=True, rank_pattern={"k_proj": 2})
    adapter = Adapter(tmp_path)
    layers = peft_layers(checkpoint, tmp_path)
    for name, layer in layers.items():
        assert adapter.config.scale(name.removesuffix(".weight")) == layer.scaling["default"], name
    assert len({layer.scaling["default"] for layer in layers.values()}) == 2


@pytest.mark.parametrize(
    "targets", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]]
)
def test_deltas_of_experts_are_pefts_own(mixtral, tmp_path, targets):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    parameters = [f"mlp.experts.{name}" for name in targets]
    patterns = {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {r".*\.down_proj": 5}}
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=parameters, **patterns
    )
    model = get_peft_model(base, config)
    layers = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, ParamWrapper):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            layers[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"] = layer
    model.save_pretrained(tmp_path)
    adapter = Adapter(tmp_path)
    assert {name for name in adapter.targets if "experts" in name} == layers.keys()
    assert len(layers) == 2 * len(targets)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        assert adapter.config.scale(name) == layer.scaling["default"]
        for expert in range(4):
            found = adapter.delta(Part(name, expert)).clone()
            # Another order of summation; measured 5e-7 for deltas of size 3.
            torch.testing.assert_close(found, expected[expert], rtol=0, atol=1e-5)
            if name.endswith("gate_up_proj"):
                halves = [adapter.delta(Part(name, expert, half)).clone() for half in (0, 1)]
                torch.testing.assert_close(torch.cat(halves), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ],
    ids=["lora_bias", "tokens", "bias", "pissa"],
)
def test_an_unsupported_option_is_refused(checkpoint, make_adapter, tmp_path, options, found):
    make_adapter(checkpoint, tmp_path, **options)
    with pytest.raises(StageError, match="not merged here") as caught:
        Adapter(tmp_path)
    assert found in str(caught.value)
    assert "rsLoRA or DoRA" in str(caught.value)


def test_an_adapter_that_is_not_a_lora_is_refused(checkpoint, tmp_path):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(StageError, match="not a LoRA") as caught:
        Adapter(tmp_path)
    assert "IA3" in str(caught.value)


def test_a_tensor_that_is_neither_a_nor_b_is_refused(uniform_adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(uniform_adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.zeros(2)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(StageError, match="tensors that are not merged") as caught:
        Adapter(folder)
    assert "base_model.model.model.norm.weight" in str(caught.value)


def test_a_folder_without_an_adapter_is_a_stage_error(tmp_path):
    with pytest.raises(StageError, match="a file is missing"):
        Adapter(tmp_path)


def test_the_scale_is_alpha_over_rank(uniform_adapter):
    config = files.read_json(uniform_adapter / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert Adapter(uniform_adapter).config.scale("model.layers.0.self_attn.q_proj") == 2
