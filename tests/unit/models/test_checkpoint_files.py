from __future__ import annotations

import json

import pytest

from workflow_scripts.log import StageError
from workflow_scripts.models import checkpoint_files
from workflow_scripts.settings import RopeScalingSettings

# Values of the models' own config.json files.
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MISTRAL_7B_V02 = {**MISTRAL_7B_V01, "sliding_window": None, "rope_theta": 1000000.0}
WITHOUT_WINDOW_KEY = {k: v for k, v in MISTRAL_7B_V01.items() if k != "sliding_window"}
NEMO = {
    **MISTRAL_7B_V02,
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 128000,
}
MIXTRAL_8X7B = {
    **MISTRAL_7B_V02,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

# Ministral 8B: one layer in four has full attention.
MINISTRAL_8B = {
    **MISTRAL_7B_V02,
    "architectures": ["MinistralForCausalLM"],
    "model_type": "ministral",
    "num_hidden_layers": 36,
    "head_dim": 128,
    "sliding_window": 32768,
    "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 9,
}


def shape_of(config, folder):
    (folder / "config.json").write_text(json.dumps(config))
    return checkpoint_files.read_shape(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MISTRAL_7B_V01, {"sliding_window": 4096, "rope_theta": 1e4, "head_dim": 128}),
        (MISTRAL_7B_V02, {"sliding_window": None, "rope_theta": 1e6, "n_experts": None}),
        (WITHOUT_WINDOW_KEY, {"sliding_window": None, "context_tokens": 32768}),
        (NEMO, {"head_dim": 128, "hidden_size": 5120, "n_heads": 32, "vocabulary_size": 131072}),
        (MIXTRAL_8X7B, {"n_experts": 8, "n_experts_per_token": 2, "sliding_window": None}),
        (MISTRAL_7B_V01, {"layer_windows": [4096] * 32, "n_experts_per_token": None}),
        (WITHOUT_WINDOW_KEY, {"layer_windows": [None] * 32}),
        (MINISTRAL_8B, {"layer_windows": [None, 32768, 32768, 32768] * 9}),
        ({**MISTRAL_7B_V01, "head_dim": None}, {"head_dim": 128}),
        ({**MISTRAL_7B_V01, "dtype": "float16"}, {"dtype": "float16"}),
    ],
    ids=[
        "7B v0.1",
        "7B v0.2",
        "no window key",
        "Nemo",
        "Mixtral",
        "one window per layer",
        "null windows",
        "interleaved windows",
        "head_dim null",
        "new dtype",
    ],
)
def test_facts_are_those_of_the_config(tmp_path, config, expected):
    facts = shape_of(config, tmp_path)
    # Compared as JSON, which has no tuples.
    assert facts.model_dump(mode="json", include=set(expected)) == expected
    assert facts.n_layers == config["num_hidden_layers"]
    assert (facts.n_heads, facts.n_kv_heads) == (32, 8)
    assert facts.architecture == config["architectures"][0]


@pytest.mark.parametrize("config", [MISTRAL_7B_V01, NEMO, MIXTRAL_8X7B, MINISTRAL_8B])
def test_facts_agree_with_transformers_where_the_config_is_whole(tmp_path, config):
    from transformers import AutoConfig

    facts = shape_of(config, tmp_path)
    reference = AutoConfig.from_pretrained(tmp_path)
    assert facts.head_dim == (reference.head_dim or 128)  # Mixtral leaves it to the model
    assert facts.sliding_window == reference.sliding_window
    assert facts.rope_theta == reference.rope_parameters["rope_theta"]
    assert facts.vocabulary_size == reference.vocab_size
    assert facts.n_kv_heads == reference.num_key_value_heads


def test_rope_theta_is_found_where_transformers_5_writes_it(tmp_path):
    rope = {"rope_theta": 1000000.0, "rope_type": "default"}
    config = {k: v for k, v in MISTRAL_7B_V02.items() if k != "rope_theta"}
    facts = shape_of({**config, "rope_parameters": rope}, tmp_path)
    assert facts.rope_theta == 1e6
    assert facts.rope_parameters == rope


def test_an_older_files_scaling_is_read_in_the_form_of_transformers_5(tmp_path):
    from transformers import AutoConfig

    scaling = {"type": "linear", "factor": 2.0}
    facts = shape_of({**MISTRAL_7B_V02, "rope_scaling": scaling}, tmp_path)
    reference = AutoConfig.from_pretrained(tmp_path).rope_parameters
    known = {key: reference[key] for key in ("rope_type", "rope_theta", "factor")}
    assert facts.rope_parameters == known
    assert shape_of(MISTRAL_7B_V02, tmp_path).rope_parameters == {}


@pytest.mark.parametrize("config", [MISTRAL_7B_V01, NEMO, MIXTRAL_8X7B, MINISTRAL_8B])
@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_scaling_stretches_the_context_and_nothing_else(tmp_path, config, kind):
    plain = shape_of(config, tmp_path)
    settings = RopeScalingSettings(type=kind, factor=2.5)
    facts = checkpoint_files.read_shape(tmp_path, settings)
    assert facts.context_tokens == int(2.5 * config["max_position_embeddings"])
    changed = {key for key, value in facts if value != getattr(plain, key)}
    assert changed == {"context_tokens", "rope_parameters", "rope_scaling"}
    rope = facts.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (kind, 2.5)
    assert rope["rope_theta"] == config["rope_theta"]
    # The context that llama.cpp may use still ends at the window.
    window = config["sliding_window"]
    assert facts.served_context_tokens == min(facts.context_tokens, window or 10**9)


def test_the_original_context_may_differ_from_the_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B_V02))
    settings = RopeScalingSettings(type="yarn", factor=2, original_context_tokens=8192)
    facts = checkpoint_files.read_shape(tmp_path, settings)
    assert facts.context_tokens == 16_384
    assert facts.rope_parameters["original_max_position_embeddings"] == 8192
    dynamic = RopeScalingSettings(type="dynamic", factor=2, original_context_tokens=8192)
    with pytest.raises(StageError, match="original_context_tokens") as caught:
        checkpoint_files.read_shape(tmp_path, dynamic)
    assert "32768" in str(caught.value)


@pytest.mark.parametrize(
    "own",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_a_second_scaling_on_top_of_a_checkpoints_own_is_refused(tmp_path, own):
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL_7B_V02, **own}))
    with pytest.raises(StageError, match="RoPE scaling of its own") as caught:
        checkpoint_files.read_shape(tmp_path, RopeScalingSettings(factor=2))
    assert "models.<name>.rope_scaling" in str(caught.value)


def test_a_model_of_another_family_is_a_stage_error(tmp_path):
    with pytest.raises(StageError) as caught:
        shape_of({**MISTRAL_7B_V01, "model_type": "llama"}, tmp_path)
    for part in ("Mistral family", "config.json, model_type", "found:    llama", "mixtral"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"]
)
def test_a_missing_key_that_decides_the_shape_is_a_stage_error(tmp_path, key):
    config = {k: v for k, v in MISTRAL_7B_V01.items() if k != key}
    with pytest.raises(StageError) as caught:
        shape_of(config, tmp_path)
    assert f"config.json, {key}" in str(caught.value)


def test_a_folder_without_config_is_a_stage_error(tmp_path):
    with pytest.raises(StageError, match="a file is missing"):
        checkpoint_files.read_shape(tmp_path)


def shard(folder, names):
    """Write an index over `names`, with two tensors in the first shard."""
    weights = {f"layer.{number}": name for number, name in enumerate([names[0], *names])}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    for name in names:
        (folder / name).touch()


def test_the_index_says_which_shards_count(tmp_path):
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    shard(tmp_path, names)
    (tmp_path / "consolidated.safetensors").touch()
    (tmp_path / "model.safetensors").touch()
    assert [path.name for path in checkpoint_files.weight_files(tmp_path)] == names


def test_without_an_index_the_single_file_counts(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "consolidated.safetensors").touch()
    assert checkpoint_files.weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_missing_shard_is_a_stage_error_that_names_it(tmp_path):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shard(tmp_path, names)
    (tmp_path / names[1]).unlink()
    with pytest.raises(StageError) as caught:
        checkpoint_files.weight_files(tmp_path)
    for part in ("incomplete", str(tmp_path / names[1]), "no such file", "index.json"):
        assert part in str(caught.value)


def test_a_folder_without_weights_is_a_stage_error(tmp_path):
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(StageError, match="model.safetensors"):
        checkpoint_files.weight_files(tmp_path)
