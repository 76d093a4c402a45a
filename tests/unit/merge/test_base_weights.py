from __future__ import annotations

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.merge import tensor_names
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.tensor_names import is_quantized_in_training, part, slabs
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.models.experts import Nf4Tensor, quantize_experts


def assembled(base):
    """Parameter → its whole weight, joined from the slabs."""
    found = {}
    for name in base.entries:
        for slab in slabs(name, base.shape(name)):
            found.setdefault(slab.part, []).append(base.weight(name, slab))
    weights = {}
    for (parameter, *_), rows in sorted(found.items(), key=lambda item: str(tuple(item[0]))):
        weights.setdefault(parameter, []).append(torch.cat(rows) if rows[0].dim() else rows[0])
    return {name: torch.cat(parts) for name, parts in weights.items()}


def dequantized(model):
    """Parameter → NF4 weight of a loaded model, dequantized by bitsandbytes."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            found[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(
                weight.data, weight.quant_state
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, Nf4Tensor):
            found[name] = parameter.data.dequantized()
    return found


@pytest.fixture(params=["one slab", "many slabs"])
def slab_elements(request, monkeypatch):
    if request.param == "many slabs":
        monkeypatch.setattr(tensor_names, "SLAB_ELEMENTS", 1500)


@pytest.mark.parametrize("kind", ["checkpoint", "tied", "mixtral", "sharded_mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dequantized_base_equals_bitsandbytes_bit_by_bit(request, slab_elements, kind, dtype):
    checkpoint = request.getfixturevalue(kind)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=quantization, device_map={"": "cpu"}
    )
    quantize_experts(model, torch.device("cpu"))
    expected = dequantized(model)
    found = assembled(BaseWeights(checkpoint, dtype))
    assert {name for name in found if is_quantized_in_training(part(name))} == expected.keys()
    assert len(expected) == (12 if "mixtral" in kind else 14)
    original = assembled(BaseWeights(checkpoint))
    for name, weight in found.items():
        if name in expected:
            assert weight.dtype == dtype
            assert torch.equal(weight, expected[name].reshape(weight.shape)), name
            assert not torch.equal(weight, original[name].to(dtype)), name
        else:
            assert torch.equal(weight, original[name]), name


def test_the_dequantized_base_is_what_training_loads(checkpoint):
    model = load_model(checkpoint, window=8, precision="nf4", device="cpu")
    expected = dequantized(model)
    found = assembled(BaseWeights(checkpoint, torch.float32))
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("kind", ["checkpoint", "tied", "mixtral"])
def test_the_original_base_is_the_files(request, slab_elements, kind):
    checkpoint = request.getfixturevalue(kind)
    base = BaseWeights(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    assert base.entries.keys() == stored.keys()
    for name in base.entries:
        rows = [base.weight(name, slab).reshape(-1) for slab in slabs(name, base.shape(name))]
        assert torch.equal(torch.cat(rows), stored[name].reshape(-1)), name


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_shard_is_named(make_checkpoint, tmp_path, damage):
    checkpoint = make_checkpoint(tmp_path / "base", max_shard_size="600KB")
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    raw = shard.read_bytes()
    shard.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"\xff" * 8 + raw[8:])
    with pytest.raises(StageError, match="a weights file is damaged or truncated") as caught:
        BaseWeights(checkpoint)
    assert shard.name in str(caught.value) and "fetch it or merge again" in str(caught.value)


@pytest.fixture(scope="module")
def sharded_mixtral(mixtral, tmp_path_factory):
    """The experts of a layer in several files, as in the 19 files of Mixtral 8x7B."""
    folder = tmp_path_factory.mktemp("sharded")
    tensors = load_file(mixtral / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(5):
        shard = f"model-{number + 1:05}-of-00005.safetensors"
        part_of = {name: tensors[name] for name in names[number::5]}
        save_file(part_of, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part_of, shard)
    files.write_json(
        folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}
    )
    (folder / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    return folder
