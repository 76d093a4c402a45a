from __future__ import annotations

import warnings

import peft.utils.other
import pytest
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import MistralConfig, MistralForCausalLM

from workflow_scripts import files
from workflow_scripts.train.adapter_files import save_adapter

BASE = MistralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapter", "lm_head too"])
def test_an_adapter_of_a_published_base_is_saved_without_asking_the_hub(
    tmp_path, monkeypatch, modules_to_save
):
    asked = []
    monkeypatch.setattr(peft.utils.other, "file_exists", lambda *names: asked.append(names))
    base = MistralForCausalLM(BASE)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules_to_save)
    model = get_peft_model(base, config)
    (tmp_path / "base").mkdir()
    files.write_json(tmp_path / "base" / "source.json", {"source": "mistralai/Mistral-7B-v0.1"})
    weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, dict(weights), tmp_path / "base", tmp_path / "adapter")
    assert asked == []
    saved = tmp_path / "adapter"
    assert {path.name for path in saved.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    name = files.read_json(saved / "adapter_config.json")["base_model_name_or_path"]
    assert name == "mistralai/Mistral-7B-v0.1"
    loaded = PeftModel.from_pretrained(MistralForCausalLM(BASE), saved)
    kept = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert any("lm_head" in name for name in kept) == (modules_to_save is not None)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert kept.keys() == expected.keys()
    assert all((kept[name] == expected[name]).all() for name in kept)
