from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from workflow_scripts import files
from workflow_scripts.export import merge_adapter, safetensors_stream
from workflow_scripts.log import StageError


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
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

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
