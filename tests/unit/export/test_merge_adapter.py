from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from workflow_scripts import files
from workflow_scripts.export import merge_adapter, safetensors_stream
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model, read_facts
from workflow_scripts.settings import RopeScalingSettings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Two files to be carried over; no weight depends on them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(b"model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def merge(checkpoint, tokenizer, adapter, merged):
    merge_adapter.main(
        ["--checkpoint", str(checkpoint), "--tokenizer", str(tokenizer)]
        + ["--adapter", str(adapter), "--merged", str(merged)]
    )
    return merged


def by_peft(checkpoint, adapter, dtype):
    """PEFT's merge in float32, each weight then rounded once."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return {name: tensor.to(dtype) for name, tensor in merged.state_dict().items()}


def all_tensors(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("kind", ["uniform_adapter", "matched_adapter"])
def test_the_merge_is_pefts_in_float32_rounded_once_bit_by_bit(
    request, checkpoint, tokenizer, tmp_path, kind
):
    adapter = request.getfixturevalue(kind)
    found = all_tensors(merge(checkpoint, tokenizer, adapter, tmp_path / "merged"))
    expected = by_peft(checkpoint, adapter, torch.bfloat16)
    base = all_tensors(checkpoint)
    assert found.keys() == expected.keys() == base.keys()
    n_changed = 0
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
        n_changed += not torch.equal(tensor, base[name])
    assert n_changed == 14


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
def test_all_that_training_makes_is_merged_to_one_rounding(
    request, train, tokenizer, tmp_path, base, recipe
):
    """Against PEFT in float32, written by transformers under the names of a checkpoint's files."""
    checkpoint = request.getfixturevalue(base)
    adapter = train(checkpoint, **recipe)
    found = all_tensors(merge(checkpoint, tokenizer, adapter, tmp_path / "merged"))
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
        # Half a unit of bfloat16's last place: 8 bits of significand; and of float32 a few, where
        # sums are taken in another order.
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


def test_the_merged_mixture_loads_and_computes_what_peft_computes(
    mixtral, train, tokenizer, tmp_path
):
    adapter = train(mixtral, **MIXTURE)
    merged = merge(mixtral, tokenizer, adapter, tmp_path / "merged")
    live = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    live = PeftModel.from_pretrained(live, str(adapter))
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected, found, before = (model(tokens).logits for model in (live, loaded, base))
    # Weights rounded to bfloat16, and a token now and then to another expert.
    assert (found - expected).abs().mean() < 0.05 * (before - expected).abs().mean()


def test_embeddings_with_more_rows_than_the_base_are_refused(
    checkpoint, train, tokenizer, tmp_path, ends_with_message
):
    adapter = train(checkpoint, modules_to_save=["embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:4]])
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = ends_with_message(
        merge_adapter.main,
        ["--checkpoint", checkpoint, "--tokenizer", tokenizer]
        + ["--adapter", adapter, "--merged", tmp_path / "merged"],
    )
    for part in (
        "the adapter does not fit the base model",
        "model.embed_tokens.weight",
        "found:    (304, 256)",
        "expected: (300, 256), as in the base",
        "need a base with as many rows",
    ):
        assert part in message
    assert not (tmp_path / "merged").exists()


def test_embeddings_that_lost_their_tie_are_refused(
    tied, train, tokenizer, tmp_path, ends_with_message
):
    adapter = train(tied, modules_to_save=["embed_tokens"])
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(adapter / "adapter_config.json", config | {"ensure_weight_tying": False})
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = ends_with_message(
        merge_adapter.main,
        ["--checkpoint", tied, "--tokenizer", tokenizer]
        + ["--adapter", adapter, "--merged", tmp_path / "merged"],
    )
    assert "the adapter trained one of them" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
@pytest.mark.parametrize("base", ["checkpoint", "mixtral"])
def test_the_merged_config_stretches_positions_as_training_did(
    request, train, tokenizer, tmp_path, base, kind
):
    checkpoint = request.getfixturevalue(base)
    scaling = RopeScalingSettings(type=kind, factor=4)
    facts = read_facts(checkpoint, scaling)
    files.write_json(tmp_path / "facts.json", facts)
    adapter = train(checkpoint)
    merged = tmp_path / "merged"
    merge_adapter.main(
        ["--checkpoint", str(checkpoint), "--facts", str(tmp_path / "facts.json")]
        + ["--tokenizer", str(tokenizer), "--adapter", str(adapter), "--merged", str(merged)]
    )
    config = files.read_json(merged / "config.json")
    assert config["rope_parameters"] == facts["rope_parameters"]
    # transformers' dynamic NTK takes this for the context of the base.
    assert config["max_position_embeddings"] == (512 if kind == "dynamic" else 2048)
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    trained = load_model(
        checkpoint,
        window=facts["sliding_window"],
        precision="float32",
        rope=facts["rope_parameters"],
    )
    frequencies = trained.model.rotary_emb.inv_freq
    assert torch.equal(loaded.model.rotary_emb.inv_freq, frequencies)
    scales = {model.model.rotary_emb.attention_scaling for model in (loaded, trained)}
    assert len(scales) == 1


def test_facts_without_scaling_leave_the_config_as_it_is(
    checkpoint, facts_path, uniform_adapter, tokenizer, tmp_path
):
    merged = tmp_path / "merged"
    merge_adapter.main(
        ["--checkpoint", str(checkpoint), "--facts", str(facts_path), "--tokenizer"]
        + [str(tokenizer), "--adapter", str(uniform_adapter), "--merged", str(merged)]
    )
    assert (merged / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_tensors_without_an_adapter_are_the_bases_byte_for_byte(
    checkpoint, make_adapter, tokenizer, tmp_path
):
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=["q_proj"])
    merged = merge(checkpoint, tokenizer, adapter, tmp_path / "merged") / "model.safetensors"
    header = safetensors_stream.read_header(merged)
    source = checkpoint / "model.safetensors"
    assert header == safetensors_stream.read_header(source)

    def data_of(path, entry):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        return raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]

    for name, entry in header.items():
        is_same = data_of(merged, entry) == data_of(source, entry)
        assert is_same != name.endswith("q_proj.weight"), name


def test_a_sharded_base_keeps_its_shards_and_index(
    make_checkpoint, make_adapter, tokenizer, tmp_path
):
    base = make_checkpoint(tmp_path / "base", max_shard_size="600KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, tokenizer, adapter, tmp_path / "merged")
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
    ("stored", "written"), [("float16", torch.float16), ("float32", torch.bfloat16)]
)
def test_the_merged_model_is_of_sixteen_bits(
    make_checkpoint, make_adapter, tokenizer, tmp_path, stored, written
):
    base = make_checkpoint(tmp_path / "base", dtype=stored)
    adapter = make_adapter(base, tmp_path / "adapter")
    found = all_tensors(merge(base, tokenizer, adapter, tmp_path / "merged"))
    expected = by_peft(base, adapter, written)
    for name, tensor in found.items():
        assert tensor.dtype == written
        assert torch.equal(tensor, expected[name]), name


def test_the_folder_loads_with_from_pretrained_and_computes_what_the_live_adapter_does(chain):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(chain.merged, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(chain.checkpoint, dtype=torch.float32)
    live = PeftModel.from_pretrained(base, str(chain.adapter))
    tokens = AutoTokenizer.from_pretrained(chain.merged)("A list is", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (merged(tokens).logits - live(tokens).logits).abs().max()
    assert difference < 0.05  # one rounding to bfloat16 a weight; measured 0.02


def test_the_folder_holds_weights_config_and_tokenizer_and_nothing_else(
    checkpoint, uniform_adapter, tokenizer, tmp_path
):
    merged = merge(checkpoint, tokenizer, uniform_adapter, tmp_path / "merged")
    assert {path.name for path in merged.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "chat_template.jinja",
    }
    assert (merged / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(
    checkpoint, make_checkpoint, make_adapter, tokenizer, tmp_path, ends_with_message
):
    deeper = make_checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    adapter = make_adapter(deeper, tmp_path / "adapter")
    message = ends_with_message(
        merge_adapter.main,
        ["--checkpoint", checkpoint, "--tokenizer", tokenizer]
        + ["--adapter", adapter, "--merged", tmp_path / "out" / "merged"],
    )
    for part in (
        "the adapter does not fit the base model",
        str(checkpoint),
        "model.layers.2.",
        "the model that the adapter was trained on",
    ):
        assert part in message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_within_a_shard_leaves_the_old_folder_as_it_was(
    checkpoint, uniform_adapter, tokenizer, tmp_path
):
    merged = merge(checkpoint, tokenizer, uniform_adapter, tmp_path / "merged")
    before = (merged / "model.safetensors").read_bytes()
    # B of the last module lost its rank: the product fails when its turn comes.
    broken = tmp_path / "broken"
    shutil.copytree(uniform_adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name] = tensors[name][:, :3].contiguous()
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(RuntimeError):
        merge(checkpoint, tokenizer, broken, merged)
    assert (merged / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "broken"}


def test_a_missing_shard_is_a_stage_error(make_checkpoint, uniform_adapter, tokenizer, tmp_path):
    base = make_checkpoint(tmp_path / "base", max_shard_size="600KB")
    next(base.glob("model-00002-*")).unlink()
    with pytest.raises(StageError, match="the checkpoint is not whole"):
        merge(base, tokenizer, uniform_adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.export.merge_adapter")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers"}
