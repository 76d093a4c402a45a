from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.facts import facts_of
from tests.unit.models.test_checkpoint_files import MINISTRAL_8B, MISTRAL_7B_V01, MIXTRAL_8X7B, NEMO
from tests.unit.train.mixtral import save_mixtral, tiny_mixtral
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.models import checkpoint_files, tensors

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the two-layer Mistral that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def check(folder):
    checkpoint_files.check_whole(folder, facts_of(folder))


def rewrite(folder, change, name="model.safetensors"):
    """Rewrite a folder's weights after `change`, which may also return new ones."""
    weights = load_file(folder / name)
    weights = change(weights) or weights
    save_file(weights, folder / name, metadata={"format": "pt"})


def refusal(folder):
    with pytest.raises(StageError) as caught:
        check(folder)
    return str(caught.value)


@pytest.mark.parametrize("config", [MISTRAL_7B_V01, NEMO, MINISTRAL_8B, MIXTRAL_8X7B])
@pytest.mark.parametrize("ties", [False, True])
def test_names_and_shapes_are_those_of_the_real_models_in_transformers(tmp_path, config, ties):
    from transformers import AutoConfig, AutoModelForCausalLM

    files.write_json(tmp_path / "config.json", config | {"tie_word_embeddings": ties})
    facts = facts_of(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    reference = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()  # the first of two tied tensors
    }
    assert tensors.required(facts, fuses_experts=True) == reference


@pytest.mark.parametrize("kind", ["mixtral", "ministral", "tied", "float32", "float16"])
def test_files_that_transformers_saves_are_complete(make_checkpoint, tmp_path, kind):
    folder = tmp_path / "saved"
    if kind == "mixtral":
        save_mixtral(folder)
    elif kind == "ministral":
        from transformers import MinistralConfig, MinistralForCausalLM

        shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        kinds = ["full_attention", "sliding_attention"]
        MinistralForCausalLM(
            MinistralConfig(**shape, head_dim=32, layer_types=kinds, sliding_window=8)
        ).save_pretrained(folder)
    elif kind == "tied":
        make_checkpoint(folder, tie_word_embeddings=True)
    else:
        make_checkpoint(folder, dtype=kind)
    check(folder)
    facts = facts_of(folder)
    found = tensors.stored(checkpoint_files.weight_files(folder))
    shapes = {name: tensor.shape for name, tensor in found.items()}
    assert shapes == tensors.required(facts)


def test_a_mixture_with_fused_experts_is_complete(tmp_path):
    folder = save_mixtral(tmp_path / "saved")
    state = {
        name: parameter.detach().contiguous()
        for name, parameter in tiny_mixtral().named_parameters()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    check(folder)
    del state["model.layers.1.mlp.experts.down_proj"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing: model.layers.1.mlp.experts.down_proj" in refusal(folder)


def test_a_sharded_model_is_complete_next_to_weights_in_mistrals_layout(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="200KB")
    assert len(checkpoint_files.weight_files(folder)) > 2
    save_file({"tok_embeddings.weight": torch.ones(3)}, folder / "consolidated.safetensors")
    check(folder)


def test_position_tables_of_old_checkpoints_are_ignored(copy):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(16).float()}
    rewrite(copy, lambda weights: weights | table)
    check(copy)
    tensors.check_all_values(checkpoint_files.weight_files(copy))


def test_a_tied_model_may_store_its_matrix_twice_but_not_only_as_the_output_layer(
    make_checkpoint, tmp_path
):
    folder = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)

    def twice(weights):
        weights[tensors.OUTPUT] = weights[tensors.EMBEDDINGS].clone()

    def as_output(weights):
        del weights[tensors.EMBEDDINGS]

    rewrite(folder, twice)
    check(folder)
    rewrite(folder, as_output)
    message = refusal(folder)
    assert f"1 missing: {tensors.EMBEDDINGS}" in message and "save_pretrained" in message


def test_a_tied_model_with_two_matrices_that_differ_is_refused(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)

    def differ(weights):
        weights[tensors.OUTPUT] = weights[tensors.EMBEDDINGS].clone()
        weights[tensors.OUTPUT][-1, -1] += 1

    rewrite(folder, differ)
    message = refusal(folder)
    assert "ties output layer and embeddings, but stores two different tensors" in message
    assert "set tie_word_embeddings: false" in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.pop(Q_PROJ) is None, ["1 missing: " + Q_PROJ, "expected: 21 tensors"]),
        (lambda w: w.pop(NORM) is None, ["1 missing: " + NORM]),
        (
            lambda w: w.pop("lm_head.weight") is None,
            ["1 missing: lm_head.weight", "tie_word_embeddings: true"],
        ),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(256, 256)}),
            ["1 not in the model: model.layers.2.mlp.up_proj.weight"],
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(256)}),
            ["1 not in the model: model.layers.0.self_attn.q_proj.bias"],
        ),
        (
            lambda w: {f"module.{name}": weight for name, weight in w.items()},
            ["21 missing", "21 not in the model: module.lm_head.weight", "… (11 more)"],
        ),
        (
            lambda w: w.update({Q_PROJ: w[Q_PROJ][:, :128].contiguous()}),
            [f"1 with a wrong shape: {Q_PROJ} [256, 128], expected [256, 256]"],
        ),
        (
            lambda w: w.update({tensors.EMBEDDINGS: w[tensors.EMBEDDINGS][:-1].contiguous()}),
            [f"{tensors.EMBEDDINGS} [299, 256], expected [300, 256]", "vocab_size must equal"],
        ),
        (
            lambda w: w.update({f"base_model.model.{Q_PROJ}.lora_A.weight": torch.ones(2, 2)}),
            ["1 not in the model", "set it as runs.<name>.adapter"],
        ),
    ],
    ids=[
        "missing", "norm", "output layer", "a layer more", "a bias", "a prefix", "shape",
        "embeddings", "adapter",
    ],
)  # fmt: skip
def test_tensors_that_the_config_does_not_describe_are_named(copy, change, parts):
    rewrite(copy, change)
    message = refusal(copy)
    for part in ["tensors do not match its config.json", *parts]:
        assert part in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_a_tensor_of_a_quantized_type_is_refused_without_quantization_config(copy, dtype):
    rewrite(copy, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ].to(dtype)}))
    message = refusal(copy)
    for part in ("already quantized", f"found:    {Q_PROJ} ", "F16", "runs.<name>.precision"):
        assert part in message


def test_scales_of_a_quantized_layer_are_recognized(copy):
    scale = {Q_PROJ.replace("weight", "weight_scale_inv"): torch.ones(1)}
    rewrite(copy, lambda weights: weights | scale)
    assert "already quantized" in refusal(copy)


def test_an_index_next_to_a_single_file_is_two_models(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="200KB")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    message = refusal(folder)
    assert "the folder contains two models" in message and "transformers uses the former" in message


def test_a_tensor_in_two_shards_is_refused(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", max_shard_size="200KB")
    first, second = checkpoint_files.weight_files(folder)[:2]
    name = next(iter(load_file(second)))
    rewrite(folder, lambda weights: weights | {name: torch.ones(1)}, first.name)
    message = refusal(folder)
    assert "two shards contain the same tensor" in message and name in message


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_found_at_any_position(tmp_path, dtype, value):
    weight = torch.full((300, 70), torch.finfo(getattr(torch, dtype)).max, dtype=torch.float64)
    weight = weight.to(getattr(torch, dtype))
    shard = tmp_path / "model.safetensors"
    save_file({"ok": weight.clone(), "weight": weight}, shard)
    tensors.check_all_values([shard])  # the largest finite numbers pass
    weight[299, 69] = value
    save_file({"ok": torch.ones(1), "weight": weight}, shard)
    with pytest.raises(StageError) as caught:
        tensors.check_all_values([shard])
    for part in ("not a finite number", "model.safetensors, weight", "element 20999"):
        assert part in str(caught.value)


def test_the_scan_reads_past_its_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 7)
    weight = torch.zeros(20)
    weight[17] = torch.nan
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match="element 17"):
        tensors.check_all_values([tmp_path / "model.safetensors"])


def test_all_zeros_are_refused_in_embeddings_and_norms(copy):
    shards = checkpoint_files.weight_files(copy)
    rewrite(copy, lambda weights: weights[Q_PROJ].zero_() is None)
    tensors.check_all_values(shards)  # as in layers added by depth up-scaling
    rewrite(copy, lambda weights: weights[NORM].zero_() is None)
    with pytest.raises(StageError) as caught:
        tensors.check_all_values(shards)
    assert "is all zeros" in str(caught.value) and NORM in str(caught.value)


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("key", "quantization", "parts"),
    [
        ("quantization_config", BITSANDBYTES, ["bitsandbytes", "load_in_4bit", "nf4"]),
        ("quantization_config", {"quant_method": "fp8", "fmt": "e4m3"}, ["fp8", "e4m3"]),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, ["gptq, bits: 4"]),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, ["awq, bits: 4"]),
        ("quantization_config", {"quant_method": "mxfp4"}, ["mxfp4"]),
        ("compression_config", {"format": "float-quantized"}, ["float-quantized"]),
    ],
    ids=["bitsandbytes", "fp8", "gptq", "awq", "mxfp4", "compressed-tensors"],
)
def test_a_quantized_base_is_refused_by_its_config(copy, key, quantization, parts):
    config = json.loads((copy / "config.json").read_text())
    files.write_json(copy / "config.json", config | {key: None})
    check(copy)  # null means not quantized
    files.write_json(copy / "config.json", config | {key: quantization, "_name_or_path": "o/base"})
    message = refusal(copy)
    for part in ("already quantized", key, "unquantized model in 16 bits", "o/base", *parts):
        assert part in message
