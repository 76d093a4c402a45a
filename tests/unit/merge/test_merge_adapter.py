from __future__ import annotations

import resource
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.facts import facts_of
from tests.training import manifest_of
from tests.unit.merge.merges import all_tensors, as_arguments, merge
from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge import merge_adapter, tensor_names
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.models.tensors import stored
from workflow_scripts.scoring.transformers_model import as_trained
from workflow_scripts.settings import RopeScalingSettings


@pytest.fixture
def refused(tmp_path, ends_with_message):
    """`refused(checkpoint, adapter)`: the message of a merge that is refused and leaves nothing."""

    def run(checkpoint, adapter):
        facts, tokenizer = tmp_path / "facts.json", tmp_path / "tokenizer"
        facts_of(checkpoint).write(facts)
        tokenizer.mkdir()
        inputs = {"checkpoint": checkpoint, "facts": facts, "tokenizer": tokenizer}
        arguments = as_arguments(**inputs, adapter=adapter, merged=tmp_path / "out" / "merged")
        message = ends_with_message(merge_adapter.main, arguments)
        assert not (tmp_path / "out").exists()
        return message

    return run


def by_peft(checkpoint, adapter, dtype):
    """PEFT's merge in float32, each weight then rounded once."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return {name: tensor.to(dtype) for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("kind", ["uniform_adapter", "matched_adapter"])
def test_the_merge_equals_pefts_in_float32_rounded_once(request, checkpoint, tmp_path, kind):
    adapter = request.getfixturevalue(kind)
    found = all_tensors(merge(checkpoint, adapter, tmp_path / "merged"))
    expected = by_peft(checkpoint, adapter, torch.bfloat16)
    base = all_tensors(checkpoint)
    assert found.keys() == expected.keys() == base.keys()
    n_changed = 0
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
        n_changed += not torch.equal(tensor, base[name])
    assert n_changed == 14


@pytest.mark.parametrize("kind", ["checkpoint", "mixtral"])
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_several_threads_write_the_bytes_of_one(request, train, tmp_path, monkeypatch, kind, base):
    checkpoint = request.getfixturevalue(kind)
    adapter = train(checkpoint, dora=True)
    monkeypatch.setattr(tensor_names, "SLAB_ELEMENTS", 1500)
    written = []
    for n_threads in (1, 4):
        torch.set_num_threads(n_threads)
        merged = merge(checkpoint, adapter, tmp_path / str(n_threads), base=base)
        written.append((merged / "model.safetensors").read_bytes())
    assert written[0] == written[1]


MIXTURE = {"adapts_experts": True, "trains_router": True}


@pytest.mark.parametrize(
    ("base", "recipe"),
    [
        ("checkpoint", {"rslora": True, "kv_rank": "matched"}),
        ("checkpoint", {"dora": True}),
        ("checkpoint", {"dora": True, "rslora": True, "kv_rank": 2, "method": "lora_int8"}),
        ("checkpoint", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("checkpoint", {"dora": True, "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("checkpoint", {"method": "full"}),
        ("tied", {"modules_to_save": ["embed_tokens"]}),
        ("tied", {"method": "full"}),
        ("mixtral", {}),
        ("mixtral", {"dora": True, "kv_rank": "matched"}),
        ("mixtral", {"adapts_experts": True}),
        ("mixtral", {"trains_router": True}),
        ("mixtral", {**MIXTURE, "rslora": True}),
        ("mixtral", {**MIXTURE, "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("mixtral", {"method": "full"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "lora",
)
def test_every_kind_of_training_is_merged_to_one_rounding(request, train, tmp_path, base, recipe):
    """Compared with PEFT in float32, saved by transformers under a checkpoint's names."""
    checkpoint = request.getfixturevalue(base)
    adapter = train(checkpoint, **recipe)
    found = all_tensors(merge(checkpoint, adapter, tmp_path / "merged"))
    original = all_tensors(checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if recipe.get("method") == "full":
        weights = load_file(adapter / "adapter_model.safetensors")
        result = reference.load_state_dict(weights, strict=False)
        assert not result.unexpected_keys
    else:
        reference = PeftModel.from_pretrained(reference, str(adapter)).merge_and_unload()
    reference.save_pretrained(tmp_path / "reference")
    expected = all_tensors(tmp_path / "reference")
    assert found.keys() == expected.keys() == original.keys()
    n_changed = 0
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16 and tensor.dtype == torch.float32
        # Half a unit in the last place of bfloat16 (8 bits of significand), and a few of float32,
        # as sums are taken in another order.
        room = tensor.abs() * (2**-8 + 2**-20) + 1e-7
        assert ((found[name].float() - tensor).abs() <= room).all(), name
        n_changed += not torch.equal(found[name], original[name])
    assert n_changed >= 1 + len(recipe.get("modules_to_save", []))
    if recipe.get("adapts_experts"):
        assert not any(
            torch.equal(found[name], original[name]) for name in found if ".experts." in name
        )
    if not (recipe.get("trains_router") or recipe.get("method") == "full"):
        routers = [name for name in found if name.endswith("block_sparse_moe.gate.weight")]
        assert all(torch.equal(found[name], original[name]) for name in routers)


def test_the_merged_mixture_loads_and_computes_what_peft_computes(mixtral, train, tmp_path):
    adapter = train(mixtral, **MIXTURE)
    merged = merge(mixtral, adapter, tmp_path / "merged")
    live = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    live = PeftModel.from_pretrained(live, str(adapter))
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected, found, before = (model(tokens).logits for model in (live, loaded, base))
    # Weights are rounded to bfloat16, and now and then a token goes to another expert.
    assert (found - expected).abs().mean() < 0.05 * (before - expected).abs().mean()


@pytest.mark.parametrize("kind", ["uniform", "dora"])
def test_a_merge_into_the_dequantized_base_equals_pefts_into_bitsandbytes_weights(
    checkpoint, train, tmp_path, monkeypatch, kind
):
    """PEFT in float32 on weights that bitsandbytes dequantized, each then rounded once."""
    monkeypatch.setattr(tensor_names, "SLAB_ELEMENTS", 64 * 256)
    adapter = train(checkpoint, dora=kind == "dora", kv_rank="matched")
    manifest_of(compute_dtype="float32").write(adapter / "training_manifest.json")
    merged = merge(checkpoint, adapter, tmp_path / "merged", base="dequantized")
    found = all_tensors(merged)
    quantized = load_model(checkpoint, window=8, precision="nf4", device="cpu")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    parameters = dict(base.named_parameters())
    n_dequantized = 0
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            parameters[f"{name}.weight"].data.copy_(weight)
            n_dequantized += 1
    assert n_dequantized == 14
    reference = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        expected = tensor.to(torch.bfloat16)
        if kind == "dora":
            # They differ in the last place of float32, so that a few weights round differently.
            torch.testing.assert_close(found[name], expected, rtol=2**-7, atol=1e-8)
            assert (found[name] == expected).float().mean() > 0.99, name
        else:
            assert torch.equal(found[name], expected), name


def test_linear_layers_without_an_adapter_are_dequantized_too(checkpoint, make_adapter, tmp_path):
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=["q_proj"])
    found = all_tensors(merge(checkpoint, adapter, tmp_path / "m", base="dequantized"))
    for name, tensor in all_tensors(checkpoint).items():
        assert torch.equal(found[name], tensor) != name.endswith("_proj.weight"), name


@pytest.fixture(scope="module")
def fused_mixtral(mixtral, tmp_path_factory):
    """The same Mixtral under the names and in the shapes of transformers 5."""
    folder = tmp_path_factory.mktemp("fused")
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(mixtral / name, folder / name)
    assert list(tensors["model.layers.0.mlp.experts.gate_up_proj"].shape) == [4, 192, 64]
    return folder


@pytest.mark.parametrize("base", ["original", "dequantized"])
@pytest.mark.parametrize("recipe", [MIXTURE, {"method": "full"}, {}], ids=["lora", "full", "plain"])
def test_fused_experts_are_merged_as_separate_ones_are(
    mixtral, fused_mixtral, train, tmp_path, monkeypatch, recipe, base
):
    monkeypatch.setattr(tensor_names, "SLAB_ELEMENTS", 64 * 64)
    adapter = train(mixtral, **recipe)
    apart = merge(mixtral, adapter, tmp_path / "apart", base=base)
    fused = merge(fused_mixtral, adapter, tmp_path / "fused", base=base)
    expected = AutoModelForCausalLM.from_pretrained(apart).state_dict()
    found = load_file(fused / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # A and B of an expert are the same in both; the product has other rows.
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-8)
        assert (found[name] == tensor).float().mean() > 0.999, name


@pytest.fixture(scope="module")
def resize(make_checkpoint, tmp_path_factory):
    """`resize(**config)`: a base, and an adapter trained after five tokens were added to it."""

    def make(**config):
        from peft import LoraConfig, get_peft_model

        base = make_checkpoint(tmp_path_factory.mktemp("base"), **config)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(3)
        model.resize_token_embeddings(305)
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        adapter = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(adapter)
        return base, adapter, model.merge_and_unload()

    return make


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_embeddings_resized_for_new_tokens_are_merged(resize, tmp_path, config):
    base, adapter, reference = resize(**config)
    merged = merge(base, adapter, tmp_path / "merged")
    assert files.read_json(merged / "config.json")["vocab_size"] == 305
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    expected = {name: tensor.bfloat16().float() for name, tensor in reference.state_dict().items()}
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert found["model.embed_tokens.weight"].shape == (305, 256)
    assert files.read_json(base / "config.json")["vocab_size"] == 300


def test_a_live_adapter_with_resized_embeddings_is_what_was_trained(resize, tmp_path):
    base, adapter, reference = resize()
    live = as_trained(load_model(base, window=8, precision="float32", device="cpu"), adapter)
    tokens = torch.tensor([[1, 7, 304, 300, 12]])
    with torch.no_grad():
        expected = reference(tokens, use_cache=False).logits
        found = live(tokens, use_cache=False).logits
    assert found.shape == (1, 5, 305)
    # Merged and live model sum in different orders; logits are about 3 in size.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_embeddings_that_grew_at_only_one_end_are_refused(checkpoint, train, refused):
    adapter = train(checkpoint, modules_to_save=["embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:4]])
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refused(checkpoint, adapter)
    for part in (
        "the adapter has more embeddings than the base",
        "lm_head.weight",
        "found:    300 rows",
        "expected: 304, in the adapter",
    ):
        assert part in message


@pytest.mark.parametrize("change", ["fewer rows", "more columns"])
def test_embeddings_of_another_shape_are_refused(checkpoint, train, refused, change):
    adapter = train(checkpoint, modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = (
        tensors[name][:296].clone()
        if change == "fewer rows"
        else torch.cat([tensors[name], tensors[name][:, :4]], dim=1)
    )
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refused(checkpoint, adapter)
    assert "the adapter does not fit the base model" in message
    assert "expected: (300, 256), as in the base" in message


def test_embeddings_that_lost_their_tie_are_refused(tied, train, refused):
    adapter = train(tied, modules_to_save=["embed_tokens"])
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(adapter / "adapter_config.json", config | {"ensure_weight_tying": False})
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refused(tied, adapter)
    assert "the adapter trained one of them" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
@pytest.mark.parametrize("base", ["checkpoint", "mixtral"])
def test_the_merged_config_stretches_positions_as_training_did(
    request, train, tmp_path, base, kind
):
    checkpoint = request.getfixturevalue(base)
    scaling = RopeScalingSettings(type=kind, factor=4)
    facts = facts_of(checkpoint, scaling)
    merged = merge(checkpoint, train(checkpoint), tmp_path / "merged", facts=facts)
    config = files.read_json(merged / "config.json")
    assert config["rope_parameters"] == facts.rope_parameters
    # transformers' dynamic NTK takes this key as the context of the base.
    assert config["max_position_embeddings"] == (512 if kind == "dynamic" else 2048)
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    trained = load_model(
        checkpoint,
        window=facts.sliding_window,
        precision="float32",
        rope=facts.rope_parameters,
    )
    frequencies = trained.model.rotary_emb.inv_freq
    assert torch.equal(loaded.model.rotary_emb.inv_freq, frequencies)
    scales = {model.model.rotary_emb.attention_scaling for model in (loaded, trained)}
    assert len(scales) == 1


def test_tensors_without_an_adapter_are_the_bases_byte_for_byte(checkpoint, make_adapter, tmp_path):
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=["q_proj"])
    merged = merge(checkpoint, adapter, tmp_path / "merged") / "model.safetensors"
    found, expected = stored([merged]), stored([checkpoint / "model.safetensors"])
    assert found.keys() == expected.keys()

    def data_of(entry):
        return entry.dtype, entry.path.read_bytes()[entry.first_byte :][: entry.n_bytes]

    for name in found:
        is_same = data_of(found[name]) == data_of(expected[name])
        assert is_same != name.endswith("q_proj.weight"), name


def test_position_tables_of_an_old_base_change_nothing(checkpoint, uniform_adapter, tmp_path):
    """Old checkpoints hold `inv_freq`, which is not a parameter and is not merged."""
    old = shutil.copytree(checkpoint, tmp_path / "old")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(16).float()}
    path = old / "model.safetensors"
    save_file(load_file(path) | table, path, metadata={"format": "pt"})
    found = all_tensors(merge(old, uniform_adapter, tmp_path / "merged"))
    expected = all_tensors(merge(checkpoint, uniform_adapter, tmp_path / "expected"))
    assert found.keys() - expected.keys() == table.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_sharded_base_keeps_its_shards_and_index(make_checkpoint, make_adapter, tmp_path):
    base = make_checkpoint(tmp_path / "base", max_shard_size="600KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (merged / index).read_bytes() == (base / index).read_bytes()
    for name, shard in files.read_json(merged / index)["weight_map"].items():
        with safe_open(merged / shard, framework="pt") as file:
            assert name in file.keys()
    expected = by_peft(base, adapter, torch.bfloat16)
    for name, tensor in all_tensors(merged).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("dtype", "written"), [("float16", torch.float16), ("float32", torch.bfloat16)]
)
def test_the_merged_model_has_a_16_bit_type(
    make_checkpoint, make_adapter, tmp_path, dtype, written
):
    base = make_checkpoint(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter")
    found = all_tensors(merge(base, adapter, tmp_path / "merged"))
    expected = by_peft(base, adapter, written)
    for name, tensor in found.items():
        assert tensor.dtype == written
        assert torch.equal(tensor, expected[name]), name


def test_the_folder_loads_with_from_pretrained_and_computes_what_the_live_adapter_does(chain):
    merged = AutoModelForCausalLM.from_pretrained(chain.merged, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(chain.checkpoint, dtype=torch.float32)
    live = PeftModel.from_pretrained(base, str(chain.adapter))
    tokens = AutoTokenizer.from_pretrained(chain.merged)("A list is", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (merged(tokens).logits - live(tokens).logits).abs().max()
    assert difference < 0.05  # one rounding to bfloat16 per weight; measured 0.02


def test_the_folder_holds_weights_config_and_tokenizer_and_nothing_else(
    checkpoint, uniform_adapter, tmp_path
):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(b"model")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    merged = merge(checkpoint, uniform_adapter, tmp_path / "out" / "merged", tokenizer=tokenizer)
    assert {path.name for path in merged.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "chat_template.jinja",
    }
    assert (merged / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(
    checkpoint, make_checkpoint, make_adapter, refused, tmp_path
):
    deeper = make_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    adapter = make_adapter(deeper, tmp_path / "adapter")
    message = refused(checkpoint, adapter)
    for part in (
        "the adapter does not fit the base model",
        str(checkpoint),
        "model.layers.2.",
        "the model that the adapter was trained on",
    ):
        assert part in message


def test_a_failure_within_a_shard_leaves_the_old_folder_as_it_was(
    checkpoint, uniform_adapter, tmp_path
):
    merged = merge(checkpoint, uniform_adapter, tmp_path / "merged")
    before = (merged / "model.safetensors").read_bytes()
    # No file may grow beyond half a shard, so the write fails.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(StageError, match="the disk is full"):
            merge(checkpoint, uniform_adapter, merged)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (merged / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}


def test_a_missing_shard_is_a_stage_error(make_checkpoint, uniform_adapter, tmp_path):
    base = make_checkpoint(tmp_path / "base", max_shard_size="600KB")
    next(base.glob("model-00002-*")).unlink()
    with pytest.raises(StageError, match="the checkpoint is incomplete"):
        merge(base, uniform_adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.merge.merge_adapter")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
