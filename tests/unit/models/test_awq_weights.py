from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.models import awq_weights
from workflow_scripts.models.checkpoint import load_model

INPUTS, OUTPUTS, GROUP = 256, 64, 32


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """AutoAWQ's order: outputs 0, 2, 4, 6, 1, 3, 5, 7 of a word, from its lowest bits."""
    eights = numbers.long().reshape(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    words = sum(eights[:, :, place] << (4 * place) for place in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.fixture
def numbers() -> torch.Tensor:
    return torch.randint(0, 16, (INPUTS, OUTPUTS), generator=torch.Generator().manual_seed(0))


def test_every_number_is_unpacked_to_its_place(numbers):
    assert torch.equal(awq_weights.unpack(pack(numbers)).long(), numbers)
    assert (pack(numbers) < 0).any()  # the sign bit of a word belongs to a number


def test_unpacking_inverts_the_quantizers_packing(numbers):
    """auto-round's own layer, with zero point 5 and scale 1."""
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM

    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = (numbers - 5).float().T.contiguous()
    groups = (INPUTS // GROUP, OUTPUTS)
    packed = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=torch.ones(groups), zeros=torch.full(groups, 5.0), device="cpu"
    )
    assert torch.equal(awq_weights.unpack(packed.qweight).long(), numbers)
    found = awq_weights.dequantize(packed.qweight, packed.qzeros, packed.scales)
    assert torch.equal(found, linear.weight.data)


def test_a_weight_is_scale_times_number_minus_zero(numbers):
    generator = torch.Generator().manual_seed(1)
    zeros = torch.randint(0, 16, (INPUTS // GROUP, OUTPUTS), generator=generator)
    scales = torch.rand(zeros.shape, generator=generator).half()
    found = awq_weights.dequantize(pack(numbers), pack(zeros), scales)
    assert found.shape == (OUTPUTS, INPUTS) and found.dtype == torch.float32
    for row, column in ((0, 0), (1, 31), (7, 32), (63, 255), (42, 100)):
        at = column // GROUP, row
        expected = scales[at].double() * (numbers[column, row] - zeros[at])
        assert found[row, column].double() == expected  # 15 bits of 24: no rounding


def test_auto_rounds_own_dequantization_rounds_the_same_weights_to_16_bits(numbers):
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    generator = torch.Generator().manual_seed(2)
    zeros = torch.randint(0, 16, (INPUTS // GROUP, OUTPUTS), generator=generator)
    scales = torch.rand(zeros.shape, generator=generator).half()
    packed = pack(numbers), pack(zeros), scales
    expected = dequantize_gemm(*packed, 4, GROUP)
    assert torch.equal(awq_weights.dequantize(*packed).half(), expected.T)


@pytest.fixture
def packed_checkpoint(checkpoint, tmp_path):
    """The tiny Mistral with only its first q_proj packed."""
    folder = tmp_path / "packed"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    outputs, inputs = tensors.pop(f"{name}.weight").shape
    generator = torch.Generator().manual_seed(3)
    tensors[f"{name}.qweight"] = pack(torch.randint(0, 16, (inputs, outputs), generator=generator))
    tensors[f"{name}.qzeros"] = pack(torch.full((inputs // GROUP, outputs), 7))
    tensors[f"{name}.scales"] = torch.full((inputs // GROUP, outputs), 0.01).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantization(folder)
    return folder


def set_quantization(folder, **other):
    config = files.read_json(folder / "config.json")
    layout = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    files.write_json(folder / "config.json", config | {"quantization_config": layout | other})


def test_a_packed_model_loads_with_dequantized_weights(packed_checkpoint, checkpoint):
    found = load_model(packed_checkpoint, window=8, precision="float32", device="cpu")
    assert found.config.sliding_window == 8 and not hasattr(found.config, "quantization_config")
    plain = dict(load_model(checkpoint, window=8, precision="float32").named_parameters())
    for name, weight in found.named_parameters():
        if name == "model.layers.0.self_attn.q_proj.weight":
            tensors = load_file(packed_checkpoint / "model.safetensors")
            numbers = awq_weights.unpack(tensors[name.replace("weight", "qweight")])
            expected = (numbers - 7).T * torch.tensor(0.01).half().float()
            assert torch.equal(weight, expected)
        else:
            assert torch.equal(weight, plain[name])
    token_ids = torch.tensor([[1, 5, 77]])
    assert found(token_ids).logits.isfinite().all()


def test_tied_embeddings_stay_tied(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    set_quantization(folder)
    model = load_model(folder, window=8, precision="float32", device="cpu")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_another_layout_is_refused(packed_checkpoint):
    set_quantization(packed_checkpoint, version="gemv")
    with pytest.raises(StageError, match="this AWQ layout is not supported") as caught:
        load_model(packed_checkpoint, window=8, precision="float32")
    assert "'version': 'gemv'" in str(caught.value)
    assert str(packed_checkpoint / "config.json") in str(caught.value)


def test_a_missing_weight_is_named(packed_checkpoint):
    tensors = load_file(packed_checkpoint / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, packed_checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="incomplete") as caught:
        load_model(packed_checkpoint, window=8, precision="float32")
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


def test_a_packed_model_is_not_quantized_again(packed_checkpoint):
    with pytest.raises(StageError, match="cannot be quantized again"):
        load_model(packed_checkpoint, window=8, precision="nf4")
